"""The comparison of two commits: its interval, and that it ends as it must."""

import math

import pytest

from benchmarks.against import interval, main


def test_the_interval_is_students_over_logarithms() -> None:
    ratios = [math.exp(log) for log in (0.01, 0.03, -0.02, 0.0, 0.02, 0.01, -0.01, 0.04)]
    # mean 0.01, standard deviation 0.02, eight pairs: 2.365 * 0.02 / sqrt(8)
    low, high = interval(ratios)
    assert math.log(low) == pytest.approx(0.01 - 0.016723, abs=1e-5)
    assert math.log(high) == pytest.approx(0.01 + 0.016723, abs=1e-5)
    assert interval([0.9] * 8) == pytest.approx((0.9, 0.9))


def test_too_few_pairs_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["against", "HEAD", "--pairs", "3"])
    with pytest.raises(SystemExit):
        main()
    assert "--pairs 3: at least 8" in capsys.readouterr().err
