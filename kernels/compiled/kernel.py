"""What kernels share: a matrix product that the interpreter gets right, tiles of rows, and how a kernel is listed.

Every op's kernel.py has a `configurations()`: the specialisations that are shipped. benchmarks/aot.py compiles each
ahead of time, without a GPU, and fails on a register spill (benchmarks/README.md).
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, accumulated in float32; float32 operands are multiplied in full precision.

    The interpreter keeps bfloat16 as raw bits and would multiply those, so there the operands are widened first.
    """
    if _UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


class Tiles(NamedTuple):
    """Tiles of rows that belong together: to one adapter, or to one expert place. In a kernel, pointers to int32."""

    tiles: Any  # [most, 3]: adapter slot or expert place, first row, number of rows
    num_tiles: Any  # [1]: how many of them there are
    pairs: Any  # [P], for routed experts, whose rows are positions: the (token, choice) pair at each position


@triton.jit
def open_tile(tiles, tile):
    """(adapter slot or expert place, first row, number of rows) of a tile by its number."""
    at = tiles.tiles + tile * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


class Chip(NamedTuple):
    """What kernels run on, or are compiled for."""

    architecture: str  # "sm_90", "gfx942"; "" in the interpreter
    name: str = ""  # "NVIDIA H200"; "" where there is only something to compile for
    multiprocessors: int = 4


@cache
def chip_of(device: torch.device) -> Chip:
    """Where kernels compute on the tensors of a device."""
    if INTERPRETED:
        return Chip("")
    target = triton.runtime.driver.active.get_current_target()
    architecture = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    if device.type != "cuda":
        return Chip(architecture)
    properties = torch.cuda.get_device_properties(device)
    return Chip(architecture, properties.name, properties.multi_processor_count)


def stages(wanted: int) -> int:
    """Steps of a loop whose loads are under way at once; AMD's chips have a third of the shared memory."""
    return min(wanted, AMD_STAGES) if torch.version.hip else wanted


def multiprocessors(x: torch.Tensor) -> int:
    """Of the device that a tensor is on."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


AMD_STAGES = 2


def registers(most: int) -> dict[str, int]:
    """As options of a launch. Where nothing is said, NVIDIA's assembler spills a little if more programs then fit at a
    time, whether there are more or not."""
    return {} if torch.version.hip else {"maxnreg": most}


NVIDIA, AMD = ("sm_80", "sm_90"), ("gfx942",)


def integer(value: int) -> str:
    """The type of an integer argument of this value, as Triton sees it (see Configuration)."""
    return "i32:1" if value == 1 else "i32:16" if value % 16 == 0 else "i32"


class Configuration(NamedTuple):
    """One specialisation of a kernel, as its launch function would ask for it.

    types: of each argument that is not a constexpr, in the notation of triton.tools.compile. "*bf16" is a pointer, and
    "i32" and "fp32" are numbers. Triton compiles a kernel anew for some properties of an argument, which the notation
    adds: ":16" to a pointer or integer that is a multiple of 16, ":1" to an integer that is 1. An argument that is a
    NamedTuple has a NamedTuple of such types.
    """

    name: str  # of the shape, within the kernel: "decode r16"
    kernel: Any  # the @triton.jit function
    types: Mapping[str, Any]
    constants: Mapping[str, Any]  # constexpr arguments
    num_warps: int = 4
    num_stages: int = 3
    targets: tuple[str, ...] = NVIDIA + AMD
    most_registers: int | None = None  # of a thread, on NVIDIA's chips, where the launch says so (`registers`)
