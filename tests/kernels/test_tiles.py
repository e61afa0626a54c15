"""Sizes by chip, and how high tiles of experts' rows are."""

import pytest

from kernels.compiled.kernel import Chip
from kernels.compiled.tiles import size_on
from kernels.grouped_gemm import tiles

SIZES = {"": {16: "any", 64: "any, high"}, "sm_90": {64: "of these"}, "H200": {16: "measured"}}


@pytest.mark.parametrize(("architecture", "name", "key", "wanted"), [
    ("", "", 16, "any"), ("sm_80", "NVIDIA A100", 64, "any, high"), ("sm_90", "NVIDIA H100", 64, "of these"),
    ("sm_90", "NVIDIA H100", 16, "any"), ("sm_90", "NVIDIA H200", 16, "measured"),
    ("sm_90", "NVIDIA H200", 64, "of these"),
])  # fmt: skip
def test_a_size_is_of_the_chip_if_it_has_one(architecture: str, name: str, key: int, wanted: str) -> None:
    assert size_on(Chip(architecture, name), SIZES, key) == wanted


def test_a_size_that_no_entry_has() -> None:
    with pytest.raises(KeyError, match="no size for 32"):
        size_on(Chip("sm_90"), SIZES, 32)


@pytest.mark.parametrize(
    ("tokens", "rows"), [(1, 16), (90, 16), (91, 32), (176, 64), (512, 64), (513, 128), (8192, 128)]
)
def test_tiles_are_twice_as_high_as_an_expert_has_rows(tokens: int, rows: int) -> None:
    """DeepSeek-V2-Lite: six of 64."""
    assert tiles.tile_rows(tokens * 6, 64) == rows


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_tile_has_blocks(architecture: str, itemsize: int) -> None:
    for sizes in (tiles.GATE_UP, tiles.DOWN):
        for rows in tiles.TILE_ROWS:
            assert size_on(Chip(architecture), sizes, (itemsize, rows)).columns
