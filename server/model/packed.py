"""A linear's own product on a CPU, with its matrix in the form that this machine multiplies fastest."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.linear import Matrix
from server.model.linear_forms import ROW_CLASSES, Choice, FormChooser
from server.model.own_memory import MappedFiles
from server.model.product import DenseProduct, Product, product_of


class PackedProduct(nn.Module):
    """Implements Product. The matrix is no parameter: it moves to no other device and is written by nobody."""

    def __init__(self, dense: DenseProduct, weight: Tensor, choice: Choice, is_tied: bool) -> None:
        """weight: that of `dense`. is_tied: it is the embedding's too."""
        super().__init__()
        self.widths, self.in_features, self.bias = dense.widths, dense.in_features, dense.bias
        self.matrix = Matrix(weight, choice.forms, keep_dense=is_tied)
        self._by_rows = tuple(zip(ROW_CLASSES, choice.by_class, strict=True))

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        form = next((form for most, form in self._by_rows if len(rows) <= most), self._by_rows[-1][1])
        return self.matrix.product(form, rows, self.bias).view(*x.shape[:-1], self.matrix.shape[0])

    def rows(self, index: int) -> Tensor:
        start = sum(self.widths[:index])
        return self.matrix.dense()[start : start + self.widths[index]]


class Made(NamedTuple):
    """A product, for whoever wants to be told."""

    shape: tuple[int, int]  # out, in
    choice: Choice
    copies: int
    is_tied: bool


class PackedProducts:
    """Makes the products of a model one after another: an original is free before the next one is packed."""

    def __init__(self, chooser: FormChooser, model: nn.Module) -> None:
        """model: as it was loaded."""
        self._files = MappedFiles()
        self._files.own_parameters(model, nn.Embedding)  # a head's weight may be the same
        self._chooser, self._tied = chooser, tied_weights(model)
        self._made: list[Made] = []

    def product_of(self, linears: Sequence[nn.Module]) -> Product:
        dense = product_of(linears)
        is_tied = dense.weight.data_ptr() in self._tied
        choice = self._chooser.choose(dense.weight, dense.bias, is_tied)
        weight = self._files.own(dense.weight.detach()) if choice.keeps_dense else dense.weight
        product = PackedProduct(dense, weight, choice, is_tied)
        self._made.append(Made(product.matrix.shape, choice, product.matrix.copies, is_tied))
        return product

    def finish(self, model: nn.Module) -> tuple[Made, ...]:
        """All are made: let go of the checkpoint, and keep what was measured for the next start."""
        self._files.own_parameters(model)
        self._chooser.finish()
        return tuple(self._made)


def tied_weights(model: nn.Module) -> frozenset[int]:
    """Addresses of the parameters that several modules have: embeddings that are the head as well."""
    seen: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        seen[parameter.data_ptr()] = seen.get(parameter.data_ptr(), 0) + 1
    return frozenset(address for address, count in seen.items() if count > 1)
