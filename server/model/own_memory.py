"""Weights out of the checkpoint's file, which the loader maps into memory, into memory of ours.

A mapped file is resident, whole, for as long as one tensor of it is in use: with packed copies of its matrices beside
it, a base would take its size twice. Nor may a server's weights change when somebody writes to that file.
"""

from bisect import bisect_right
from pathlib import Path

from torch import Tensor, nn

_MAPS = Path("/proc/self/maps")


class MappedFiles:
    """Which addresses are a file's, at the time when this is made."""

    def __init__(self) -> None:
        lines = _MAPS.read_text().splitlines() if _MAPS.is_file() else []
        fields = [line.split(maxsplit=5) for line in lines]  # range, rights, offset, device, inode, path
        ranges = [it[0].split("-") for it in fields if len(it) == 6 and it[4] != "0"]
        self._ranges = sorted((int(begin, 16), int(end, 16)) for begin, end in ranges)

    def own(self, tensor: Tensor) -> Tensor:
        """Itself, or a copy if its bytes are a file's."""
        at = bisect_right(self._ranges, (tensor.data_ptr(), 1 << 64)) - 1
        return tensor.clone() if at >= 0 and tensor.data_ptr() < self._ranges[at][1] else tensor

    def own_parameters(self, model: nn.Module, only: type[nn.Module] = nn.Module) -> None:
        """In place, one after another: of modules of a type, or of all."""
        for module in model.modules():
            if isinstance(module, only):
                for parameter in module.parameters(recurse=False):
                    parameter.data = self.own(parameter.data)
