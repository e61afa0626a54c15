"""Products whose matrices are packed: what they are made of, give back and let go."""

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels.linear import FORMS, Form
from kernels.linear.forms import available
from server.model.families import UnsupportedModelError
from server.model.linear_forms import ROW_CLASSES, FormChooser, always, best
from server.model.linear_times import LinearTimes, Shape, cache_directory
from server.model.own_memory import MappedFiles
from server.model.packed import PackedProducts, tied_weights

NAMES = [form.name for form in FORMS]
BY_NAME = {form.name: form for form in FORMS}
SHAPE = Shape(256, 256, torch.float32, False)


def products(model: nn.Module, directory: Path, wanted: str) -> PackedProducts:
    return PackedProducts(FormChooser(wanted, LinearTimes(directory, 1)), model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 24), nn.Linear(24, 40, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("wanted", NAMES)
@pytest.mark.parametrize("biases", [(True, False), (False, False)])
def test_siblings_are_one_product_slice_by_slice(tmp_path: Path, wanted: str, biases: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    linears = nn.ModuleList(nn.Linear(24, width, bias=b) for width, b in zip((33, 7), biases, strict=True))
    rows = [linear.weight.detach().clone() for linear in linears]
    with torch.inference_mode():
        product = products(linears, tmp_path, wanted).product_of(list(linears))
        for x in (torch.randn(1, 70, 24), torch.randn(24), torch.randn(2, 3, 1, 24), torch.randn(1, 0, 24)):
            wanted_y = torch.cat([linear(x) for linear in linears], -1)
            torch.testing.assert_close(product(x), wanted_y, atol=1e-5, rtol=1e-5)
    assert product.widths == (33, 7) and product.dtype == torch.float32 and (product.bias is not None) == any(biases)
    assert all(torch.equal(product.rows(index), it) for index, it in enumerate(rows))


def test_the_original_is_let_go(tmp_path: Path) -> None:
    linear = nn.Linear(64, 48)
    gone = weakref.ref(linear.weight.untyped_storage()), weakref.ref(linear.weight)
    product = products(linear, tmp_path, "onednn-packed").product_of([linear])
    del linear
    gc.collect()
    assert all(it() is None for it in gone) and not [name for name, _ in product.named_parameters() if name != "bias"]


def test_a_head_that_is_the_embedding_costs_no_copy(tmp_path: Path) -> None:
    model = Tied()
    assert tied_weights(model) == {model.embed.weight.data_ptr()} and not tied_weights(nn.Linear(2, 2))
    for wanted, copies in (("torch", 1), ("onednn", 1), ("onednn-packed", 2)):
        made = products(model, tmp_path, wanted)
        product = made.product_of([model.head])
        assert product.rows(0).data_ptr() == model.embed.weight.data_ptr()
        ((shape, _, found, is_tied),) = made.finish(model)
        assert (shape, found, is_tied) == ((40, 24), copies, True)


def test_nothing_stays_in_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(torch.randn(2000).numpy().tobytes())
    mapped = torch.from_file(str(file), shared=False, size=2000)
    model = Tied()
    with torch.no_grad():
        model.head.weight.data = mapped[:960].view(40, 24)
    values = mapped[:960].clone()
    model.embed.weight = model.head.weight
    files = MappedFiles()
    assert files.own(mapped).data_ptr() != mapped.data_ptr() and files.own(values) is values
    files.own_parameters(model)
    assert model.embed.weight is model.head.weight and model.head.weight.data_ptr() != mapped.data_ptr()
    assert torch.equal(model.head.weight.flatten(), values)


def times(torch_s: float, onednn: float, packed: float, mkl: float) -> dict[str, list[float]]:
    return dict(zip(NAMES, ([it] * 5 for it in (torch_s, onednn, packed, mkl)), strict=True))


@pytest.mark.parametrize(
    "seconds, has_dense, wanted",
    [
        ((4.0, 3.0, 2.0, 1.9), False, "onednn-packed"),
        ((2.0, 3.0, 4.0, 2.1), False, "torch"),
        ((4.0, 3.3, 3.5, 1.9), False, "onednn-packed"),  # as good as
        ((4.0, 3.0, 3.5, 0.9), False, "mkl-packed"),  # more than twice as fast as what keeps one copy
        ((4.0, 3.0, 3.5, 1.6), False, "onednn"),
        ((4.0, 3.0, 2.0, 1.9), True, "onednn"),  # beside an embedding a packed copy is a second one
        ((4.0, 3.0, 1.4, 1.9), True, "onednn-packed"),
    ],
)
def test_a_second_copy_must_be_twice_as_fast(seconds: tuple[float, ...], has_dense: bool, wanted: str) -> None:
    assert str(best(times(*seconds), FORMS, has_dense)) == wanted


def test_forms_of_one_matrix_may_take_turns_where_they_share_it() -> None:
    found = times(4.0, 3.0, 3.5, 3.0)
    found["torch"][0] = 1.0
    choice = best(found, FORMS, False)
    assert [form.name for form in choice.by_class] == ["torch", *["onednn"] * 4] and str(
        choice
    ) == "torch up to 1 rows, onednn beyond"
    short = {name: by_rows[:2] for name, by_rows in found.items()}
    assert best(short, FORMS, False) == choice  # as with as many rows as were measured
    assert not best(times(4.0, 3.0, 2.0, 1.9), FORMS, False).keeps_dense and choice.keeps_dense


def test_small_matrices_are_not_measured(tmp_path: Path) -> None:
    """Tests' models are small: what they compute does not hang on the load of a machine."""
    chooser = FormChooser("auto", LinearTimes(tmp_path, 1))
    assert chooser.choose(torch.randn(64, 64), None, False) == always(FORMS[0])
    chooser.finish()
    assert not list(tmp_path.iterdir())


def test_times_are_kept_for_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def told(weight: torch.Tensor, bias: object, forms: list[Form], *_: object) -> tuple[dict[str, list[float]], bool]:
        seen.append((weight.shape[0], weight.shape[1]))
        return {form.name: [1.0 + (form.name != "onednn")] * len(ROW_CLASSES) for form in forms}, len(seen) != 2

    monkeypatch.setattr("server.model.linear_forms.measure", told)
    first = FormChooser("auto", LinearTimes(tmp_path, 1))
    weight = torch.randn(256, 256)
    assert str(first.choose(weight, None, False)) == str(first.choose(weight, None, False)) == "onednn"
    # somebody else had the cores: what is likeliest, for this time
    assert str(first.choose(torch.randn(256, 260), None, False)) == "onednn-packed"
    first.finish()
    assert len(list(tmp_path.iterdir())) == 1 and seen == [(256, 256), (256, 260)]
    second = FormChooser("auto", LinearTimes(tmp_path, 1))
    assert str(second.choose(weight, None, False)) == "onednn" and len(seen) == 2
    assert str(FormChooser("auto", LinearTimes(tmp_path, 2)).choose(weight, None, True)) == "onednn" and len(seen) == 3


@pytest.mark.parametrize("broken", [b"", b"{", b"[]", b'{"machine":{},"shapes":{}}', b"\xff", "machine", "shapes"])
def test_a_broken_cache_is_none(tmp_path: Path, broken: bytes | str) -> None:
    whole = LinearTimes(tmp_path, 1)
    whole.put(SHAPE, times(1.0, 2.0, 3.0, 4.0))
    whole.save()
    assert LinearTimes(tmp_path, 1).get(SHAPE) == times(1.0, 2.0, 3.0, 4.0)
    if isinstance(broken, str):
        content = json.loads(whole.path.read_text())
        content[broken] = {"torch": "0"} if broken == "machine" else {str(SHAPE): {"torch": [1.0], "onednn": []}}
        broken = json.dumps(content).encode()
    whole.path.write_bytes(broken)
    again = LinearTimes(tmp_path, 1)
    assert again.get(SHAPE) is None
    again.put(SHAPE, times(1.0, 2.0, 3.0, 4.0))
    again.save()
    assert LinearTimes(tmp_path, 1).get(SHAPE) is not None


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    found = LinearTimes(tmp_path / "file", 1)
    found.put(SHAPE, times(1.0, 2.0, 3.0, 4.0))
    found.save()
    assert "not kept" in caplog.text


def test_where_the_private_ops_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.model.linear_forms.available", lambda dtype: FORMS[:1])
    linear = nn.Linear(256, 256)
    product = products(linear, tmp_path, "auto").product_of([linear])
    x = torch.randn(3, 256)
    assert torch.equal(product(x), F.linear(x, linear.weight, linear.bias))
    with pytest.raises(UnsupportedModelError, match=r"'onednn-packed' does not work here .*: auto, torch"):
        products(linear, tmp_path, "onednn-packed").product_of([linear])
    assert not list(tmp_path.iterdir())


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "heddle"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "heddle"


def test_forms_that_work_here_include_torch_own() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert FORMS[0] in available(dtype)
