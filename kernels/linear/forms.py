"""What a matrix can be kept as, and its product in each form. Those beside torch's own call private ops of torch
(what its compiler emits for CPUs), so each says whether it works here, after trying."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.linear import reference

# a hint: oneDNN's order of a matrix is the same for any number of rows that was tried. MKL's is made for this number,
# and nothing says that it is right for others: so every start tries some
_PACKED_FOR_ROWS = 32
_TRIED_ROWS = (1, 11, 200)
_TRIED = ((33, 17), (64, 48))  # shapes; the first is a multiple of nothing
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of products of normal numbers, over the root of `in`


def padded_rows(rows: int) -> int:
    """So many are computed: 1, 2, 4, multiples of 8 up to 128, of 16 up to 256, of 32 up to 512, and so on."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length() if rows else 0
    step = max(8, 1 << ((rows - 1).bit_length() - 4))
    return -(-rows // step) * step


class Form(Protocol):
    """A way to keep a matrix, and to multiply by it."""

    @property
    def name(self) -> str: ...

    @property
    def keeps_dense(self) -> bool:
        """Whether products read W itself."""

    @property
    def packs(self) -> bool:
        """Whether they read a packed copy."""

    def pack(self, weight: Tensor) -> Tensor | None:
        """weight [out, in] -> the packed copy, if there is one."""

    def product(self, x: Tensor, weight: Tensor | None, packed: Tensor | None, bias: Tensor | None) -> Tensor:
        """x [T, in] -> [T, out], contiguous. weight and packed: what the form reads; else None."""

    def dense(self, packed: Tensor) -> Tensor | None:
        """[out, in]: the matrix that was packed. None: this form cannot say."""


@dataclass(frozen=True)
class TorchForm:
    name: str = "torch"
    keeps_dense: bool = True
    packs: bool = False

    def pack(self, weight: Tensor) -> None:
        return None

    def product(self, x: Tensor, weight: Tensor | None, packed: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        if x.dtype == torch.float32:
            return reference.linear(x, weight, bias)
        return reference.linear(_padded(x), weight, bias)[: len(x)]  # oneDNN again, by torch's own choice

    def dense(self, packed: Tensor) -> None:
        return None


@dataclass(frozen=True)
class OneDnnForm:
    name: str = "onednn"
    keeps_dense: bool = True
    packs: bool = False

    def pack(self, weight: Tensor) -> None:
        return None

    def product(self, x: Tensor, weight: Tensor | None, packed: Tensor | None, bias: Tensor | None) -> Tensor:
        return _onednn(x, weight, bias)

    def dense(self, packed: Tensor) -> None:
        return None


@dataclass(frozen=True)
class OneDnnPackedForm:
    name: str = "onednn-packed"
    keeps_dense: bool = False
    packs: bool = True

    def pack(self, weight: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        return packed

    def product(self, x: Tensor, weight: Tensor | None, packed: Tensor | None, bias: Tensor | None) -> Tensor:
        return _onednn(x, packed, bias)

    def dense(self, packed: Tensor) -> Tensor:
        return packed.to_dense()


@dataclass(frozen=True)
class MklPackedForm:
    name: str = "mkl-packed"
    keeps_dense: bool = True  # the op takes both
    packs: bool = True

    def pack(self, weight: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkl._mkl_reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        return packed

    def product(self, x: Tensor, weight: Tensor | None, packed: Tensor | None, bias: Tensor | None) -> Tensor:
        # for another number of rows than it is told, the op falls back on F.linear
        y: Tensor = torch.ops.mkl._mkl_linear(x, packed, weight, bias, len(x))
        return y

    def dense(self, packed: Tensor) -> None:
        return None


FORMS: tuple[Form, ...] = (TorchForm(), OneDnnForm(), OneDnnPackedForm(), MklPackedForm())


def _onednn(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(_padded(x), weight, bias, "none", [], "")
    return y[: len(x)]


def _padded(x: Tensor) -> Tensor:
    missing = padded_rows(len(x)) - len(x)
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def why_not(form: Form, dtype: torch.dtype) -> str | None:
    """A reason for which a form is not used here, from products that were tried; None: it works."""
    if dtype not in _TOLERANCE:
        return None if form is FORMS[0] else "its type is none that was tried"
    generator = torch.Generator().manual_seed(0)
    for out_features, in_features in _TRIED:
        shapes = (out_features, max(_TRIED_ROWS))
        weight, x = (torch.randn(rows, in_features, generator=generator).to(dtype) for rows in shapes)
        bias = torch.randn(out_features, generator=generator).to(dtype)
        try:
            packed = form.pack(weight)
            dense = weight if form.keeps_dense else None
            y = torch.cat([form.product(x[:rows], dense, packed, bias) for rows in _TRIED_ROWS])
            given_back = weight if form.keeps_dense or packed is None else form.dense(packed)
        except (AttributeError, RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
            return str(error).strip().partition("\n")[0] or type(error).__name__
        tried = torch.cat([x[:rows] for rows in _TRIED_ROWS])
        wanted = reference.linear(tried.float(), weight.float(), bias.float())
        is_close = y.shape == wanted.shape and y.dtype == dtype and bool(
            (y.float() - wanted).abs().max() <= _TOLERANCE[dtype] * in_features**0.5
        )  # fmt: skip
        if not is_close or given_back is None or not torch.equal(given_back, weight):
            return f"it computed something else with a matrix of {out_features} x {in_features}"
    return None


def available(dtype: torch.dtype) -> tuple[Form, ...]:
    """Those of FORMS that work here with matrices of this type."""
    with torch.no_grad():
        return tuple(form for form in FORMS if why_not(form, dtype) is None)
