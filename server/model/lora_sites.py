"""The table of low-rank parts, as the model sees it (server/weights/tables/lora.py)."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels.lora import LoraSite, SiteAdapters, Split


class LoraSites(Protocol):
    def open(self, site: LoraSite) -> SiteAdapters:
        """A place where adapters may act; what they have for it is found there."""

    def bind(
        self,
        module: str,
        sites: Sequence[tuple[LoraSite, Split]],
        dtype: torch.dtype,
        rows: Callable[[], Tensor] | None = None,
    ) -> None:
        """Say where the weights for one of the base's linears act, in the type of what they are multiplied with.

        rows: the base's own [out, in], without bias, from which gains are derived. None: DoRA is refused there."""
