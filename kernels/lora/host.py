"""Calls lora's host kernel (host.cpp)."""

import ctypes
from ctypes import byref, c_int64, c_void_p

import torch
from torch import Tensor

from kernels.adapter_rows import AdapterTiles
from kernels.expert_route import Routed
from kernels.expert_tiles import ExpertTiles
from kernels.host import library
from kernels.lora.site import TABLE_FIELDS, LoraSite, SiteAdapters


class _Lora(ctypes.Structure):
    """Lora in host.cpp, field by field."""

    _fields_ = [
        *((name, c_void_p) for name in ("y", "x")),
        *((name, c_int64) for name in ("y_step", "x_step", "depth")),
        ("table", c_void_p),
        ("table_step", c_int64),
        ("tiles", c_void_p),
        ("num_tiles", c_int64),
        ("offsets", c_void_p),
        *((name, c_int64) for name in ("slices", "own_inputs", "transposed")),
        ("bias", c_void_p),
        ("experts", c_int64),
        *((name, c_void_p) for name in ("rows_in", "rows_out")),
        *((name, c_int64) for name in ("in_divisor", "y_is_float")),
    ]


def lora(
    y: Tensor,
    x: Tensor,
    site: LoraSite,
    adapters: SiteAdapters,
    tiles: AdapterTiles,
    max_rank: int,
    bias: Tensor | None = None,
) -> None:
    """As the reference; what the adapters have is read from the site's table."""
    assert tiles.tiles is not None
    if x.stride(-1) != 1:
        x = x.contiguous()
    assert bias is None or bias.dtype == x.dtype
    slices = len(site.widths)
    assert adapters.table is not None and adapters.offsets is not None and y.stride(1) == 1
    it = _Lora(  # in one go: this is called at every linear of every step
        y.data_ptr(), x.data_ptr(), y.stride(0), x.stride(0), x.shape[1] // (slices if site.own_inputs else 1),
        adapters.table.data_ptr(), adapters.table.stride(0) // TABLE_FIELDS, tiles.tiles.data_ptr(),
        tiles.tiles.shape[0], adapters.offsets.data_ptr(), slices, site.own_inputs, site.transposed,
        None if bias is None else bias.data_ptr(), 0, None, None, 1, y.dtype is torch.float32,
    )  # fmt: skip
    library().heddle_lora(byref(it), x.dtype is torch.bfloat16)


def expert_lora(
    y: Tensor,
    x: Tensor,
    site: LoraSite,
    adapters: SiteAdapters,
    routed: Routed,
    tiles: ExpertTiles,
    gathers: bool,
    max_rank: int,
) -> None:
    """As the reference; what the adapters have is read from the site's table."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    assert adapters.table is not None and adapters.offsets is not None and y.stride(1) == 1
    pairs = routed.pairs.data_ptr()
    it = _Lora(
        y.data_ptr(), x.data_ptr(), y.stride(0), x.stride(0), x.shape[1], adapters.table.data_ptr(),
        adapters.table.stride(0) // TABLE_FIELDS, tiles.tiles.data_ptr(), int(tiles.num_tiles),
        adapters.offsets.data_ptr(), len(site.widths), False, site.transposed, None, site.experts,
        pairs if gathers else None, None if gathers else pairs, routed.places.shape[1], y.dtype is torch.float32,
    )  # fmt: skip
    library().heddle_lora(byref(it), x.dtype is torch.bfloat16)
