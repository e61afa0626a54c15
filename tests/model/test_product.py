"""A linear's own product, and what counts as one."""

import pytest
import torch
from torch import Tensor, nn

from server.model.linears import AdaptedLinear, LinearSlice, SharedInput
from server.model.product import DenseProduct, is_linear, product_of
from server.model.site_op import Finish


class Relabelled(nn.Linear):
    """Another type that computes the same."""


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_counts_is_what_a_module_does() -> None:
    assert is_linear(nn.Linear(2, 3)) and is_linear(Relabelled(2, 3))
    assert not is_linear(Doubling(2, 3)) and not is_linear(nn.Identity()) and not is_linear(nn.Embedding(3, 2))


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (False, True, False)])
def test_siblings_are_one_product_slice_by_slice(biases: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    linears = [Relabelled(6, width, bias=bias) for width, bias in zip((4, 1, 5), biases, strict=True)]
    product, x = product_of(linears), torch.randn(2, 3, 6)
    assert product.widths == (4, 1, 5) and product.in_features == 6 and (product.bias is not None) == any(biases)
    torch.testing.assert_close(product(x), torch.cat([linear(x) for linear in linears], -1))
    for index, linear in enumerate(linears):
        assert torch.equal(product.rows(index), linear.weight)


def test_one_alone_keeps_its_own_weight() -> None:
    linear = nn.Linear(3, 4)
    assert product_of([linear]).weight is linear.weight


class Adds:
    """An op that adds a number to what it is given, and notes when."""

    def __init__(self, number: float, log: list[str]) -> None:
        self._number, self._log = number, log

    def begin(self, x: Tensor) -> Finish | None:
        self._log.append(f"begin {tuple(x.shape)}")
        return self._finish if self._number else None

    def _finish(self, y: Tensor) -> None:
        self._log.append("finish")
        y += self._number


class Logged(DenseProduct):
    def __init__(self, linear: nn.Linear, log: list[str]) -> None:
        super().__init__([linear])
        self._log = log

    def forward(self, x: Tensor) -> Tensor:
        self._log.append("product")
        return super().forward(x)


def test_ops_begin_before_the_product_and_finish_behind_it_in_order() -> None:
    log: list[str] = []
    linear, x = nn.Linear(3, 2), torch.randn(1, 5, 3)
    ops = [Adds(1.0, log), Adds(0.0, log), Adds(10.0, log)]
    with torch.no_grad():
        torch.testing.assert_close(AdaptedLinear(Logged(linear, log), ops)(x), linear(x) + 11)
    assert log == ["begin (1, 5, 3)"] * 3 + ["product", "finish", "finish"]


def test_siblings_compute_once_for_each_input() -> None:
    log: list[str] = []
    adapted = AdaptedLinear(Logged(nn.Linear(3, 2), log), [])
    adapted.product.widths = (1, 1)
    shared = SharedInput(adapted)
    first, second = (LinearSlice(adapted, shared, index) for index in range(2))
    for x in (torch.randn(1, 4, 3), torch.randn(1, 2, 3)):
        with torch.no_grad():
            torch.testing.assert_close(torch.cat([first(x), second(x)], -1), adapted.product(x))
    assert log == ["product"] * 4  # once for both siblings, once for the comparison
    assert shared._x is None  # nothing is kept alive between steps
