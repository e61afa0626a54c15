"""kill -9 at random instants of registering, replacing, rolling back and deleting: what was acknowledged is there, and
nothing is half there. `python -m benchmarks.catalogue` does it hundreds of times."""

from collections import Counter
from pathlib import Path

import pytest

from adapters_store.base_spec import BaseSpec
from tests.support.breadth import always
from tests.support.distinct_adapters import save_distinct, save_small
from tests.support.kill_loops import DriverLoops, ServerLoops, compare, inspect, revisions_of
from tests.support.linearizability import Operation
from tests.support.live_server import LiveServer, write_tokenizer
from tests.support.tiny_models import make_config, save_model

LINEAR = "model.layers.0.self_attn.q_proj"


def save_adapters(root: Path, count: int, width: int = 64) -> Path:
    save_distinct(root / "adapters", save_small(root / "like", LINEAR, width, width), count)
    return root / "adapters"


def test_a_front_that_is_killed_has_lost_nothing(tmp_path: Path) -> None:
    base, adapters = BaseSpec("tiny", {LINEAR: (64, 64)}, {}), save_adapters(tmp_path, 6)
    with DriverLoops(tmp_path / "store", base, adapters, revisions_of(adapters, base), seed=5) as loops:
        for _ in range(15):
            loops.loop()
    assert loops.counts["loops"] == 15 and loops.counts["lost"] == 0
    assert loops.counts["acknowledged"] > 10 and loops.counts["in flight"] > 3  # they did come in between


@pytest.mark.parametrize(
    ("means", "asked"),
    [
        ((), [Operation("x", "register", "a", status=201)]),  # lost
        (("a",), []),  # from nowhere
        (("b",), [Operation("x", "register", "a", status=201), Operation("x", "replace", "b")]),  # half
    ],
)
def test_the_comparison_can_fail(means: tuple[str, ...], asked: list[Operation]) -> None:
    with pytest.raises(AssertionError):
        compare({}, {"x": means} if means else {}, {"x": asked} if asked else {}, Counter())


@pytest.mark.slow
@pytest.mark.parametrize("times", always([1, 4], 1))
def test_a_server_that_is_killed_has_lost_nothing_and_has_the_same_winners(tmp_path: Path, times: int) -> None:
    width = make_config("llama").hidden_size
    adapters = save_adapters(tmp_path, 20, width)
    write_tokenizer(save_model(tmp_path / "tiny", "llama", vocab_size=256))
    base = BaseSpec("llama", {LINEAR: (width, width)}, {})
    paths = {revision: name for name, revision in revisions_of(adapters, base).items()}

    def start() -> LiveServer:
        return LiveServer(str(tmp_path / "tiny"), "--adapter-root", str(adapters), "--store", str(tmp_path / "store"),
                          log=tmp_path / "log")  # fmt: skip

    loops = ServerLoops(tmp_path / "store", start, paths, seed=2)
    for _ in range(times):
        loops.loop(num_writers=20)
    assert loops.counts["loops"] == times and loops.counts["lost"] == 0 and loops.counts["acknowledged"] > times
    states, _ = inspect(tmp_path / "store")
    assert {f"won-{number}" for number in range(times)} <= set(states)
