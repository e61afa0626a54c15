"""Every form of a matrix against F.linear, with whatever a step may bring."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import FORMS, Form, Matrix, measure, padded_rows
from kernels.linear.forms import OneDnnPackedForm, available, why_not

# of products of normal numbers, over the root of how many are summed
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
SHAPES = [(1, 1), (7, 5), (33, 17), (48, 64), (130, 96), (256, 255)]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
ALL = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)


def works(form: Form, dtype: torch.dtype) -> Form:
    if (reason := why_not(form, dtype)) is not None:
        pytest.skip(reason)
    return form


def rows_of(in_features: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "none": torch.randn(0, in_features),
        "one": torch.randn(1, in_features),
        "three": torch.randn(3, in_features),
        "seventy": torch.randn(70, in_features),
        "transposed": torch.randn(in_features, 9).T,
        "of a wider one": torch.randn(9, 2 * in_features)[:, in_features:],
        "every second": torch.randn(9, 2 * in_features)[:, ::2],
    }


@BOTH
@ALL
@pytest.mark.parametrize("threads", [1, 2])
def test_products(form: Form, dtype: torch.dtype, threads: int) -> None:
    works(form, dtype)
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for out_features, in_features in SHAPES:
            weight, bias = torch.randn(out_features, in_features).to(dtype), torch.randn(out_features).to(dtype)
            with torch.inference_mode():
                matrix = Matrix(weight, [form])
                for name, x in rows_of(in_features, dtype).items():
                    x = x.to(dtype) if x.is_contiguous() else x.to(dtype, memory_format=torch.preserve_format)
                    for b in (None, bias):
                        y, wanted = matrix.product(form, x, b), F.linear(x.float(), weight.float())
                        wanted = wanted if b is None else wanted + b.float()
                        assert y.shape == wanted.shape and y.dtype == dtype and y.is_contiguous(), name
                        atol = TOLERANCE[dtype] * max(2, in_features) ** 0.5
                        torch.testing.assert_close(
                            y.float(), wanted, atol=atol, rtol=1e-2 if dtype != torch.float32 else 1e-5
                        )
    finally:
        torch.set_num_threads(before)


@BOTH
@ALL
def test_the_matrix_comes_back_bit_by_bit(form: Form, dtype: torch.dtype) -> None:
    works(form, dtype)
    torch.manual_seed(0)
    for shape in SHAPES:
        weight = torch.randn(shape).to(dtype)
        weight.flatten()[0] = -0.0
        matrix = Matrix(weight.clone(), [form])
        dense = matrix.dense()
        assert torch.equal(dense, weight) and dense.flatten()[0].signbit() and dense.stride() == weight.stride()
        assert matrix.copies == form.keeps_dense + form.packs


@BOTH
@ALL
def test_a_row_hangs_on_no_other(form: Form, dtype: torch.dtype) -> None:
    """Nor on what memory holds below them: 70 rows are computed as 72."""
    works(form, dtype)
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64).to(dtype), torch.randn(80, 64).to(dtype)
    matrix, finite = Matrix(weight, [form]), x.clone()
    x[70:] = float("nan")
    x[3] = float("nan")
    finite[3] = 0
    got, wanted = matrix.product(form, x[:70], None), matrix.product(form, finite[:70], None)
    assert got[3].isnan().all() and torch.equal(got[4:], wanted[4:]) and torch.equal(got[:3], wanted[:3])


def test_few_numbers_of_rows_are_computed() -> None:
    padded = [padded_rows(rows) for rows in range(2049)]
    assert all(0 <= to - rows < max(8, rows / 8) for rows, to in enumerate(padded)) and padded[0] == 0
    assert padded[1:10] == [1, 2, 4, 4, 8, 8, 8, 8, 16] and padded[70] == 72 and padded[300] == 320
    assert all(padded_rows(to) == to for to in padded) and len(set(padded)) == 52


def test_torch_as_it_is_pinned_has_every_form() -> None:
    """Where this fails, a new torch has changed a private op: its form is not used, and products are slower."""
    found = {form.name: why_not(form, torch.float32) for form in FORMS}
    if not torch.backends.mkl.is_available():
        found.pop("mkl-packed")
    assert set(found.values()) == {None}, found


class Wrong(OneDnnPackedForm):
    def product(self, x: Tensor, weight: Tensor | None, packed: Tensor | None, bias: Tensor | None) -> Tensor:
        return super().product(x, weight, packed, None)


class Forgets(OneDnnPackedForm):
    def dense(self, packed: Tensor) -> Tensor:
        return super().dense(packed) + 1e-6


class Gone(OneDnnPackedForm):
    def pack(self, weight: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._no_such_op(weight)
        return packed


def test_what_does_not_work_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for form, words in ((Wrong(), "something else"), (Forgets(), "something else"), (Gone(), "_no_such_op")):
        assert words in (why_not(form, torch.float32) or "")
    monkeypatch.setattr("kernels.linear.forms.FORMS", (FORMS[0], Gone(), Wrong()))
    assert available(torch.float32) == (FORMS[0],)


def test_times_are_told_for_as_many_rows_as_there_was_time_for() -> None:
    forms = available(torch.float32)
    weight = torch.randn(64, 48)
    all_of_them = measure(weight, None, forms, (1, 8, 32), 60.0)
    assert {len(times) for times in all_of_them.times.values()} == {3}
    assert set(all_of_them.times) == {form.name for form in forms}
    assert all(time > 0 for times in all_of_them.times.values() for time in times)
    hurried = measure(weight, torch.randn(64), forms, (1, 8, 32), 0.0, least=2)
    assert {len(times) for times in hurried.times.values()} == {2}
