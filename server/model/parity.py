"""Whether an adapter is served as it is: its logits through the hot path, against those with merged weights."""

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from adapters_store.ref import AdapterRef
from server.engine.checks import CheckFailed, Found
from server.engine.plan import Scheduled
from server.engine.request import BASE_SLOT, LaneSpec, Request, Sampling, Slot
from server.model.experts import RoutedExperts
from server.model.forward import Forward
from server.model.inputs import AdapterTables, lay_out
from server.model.merged import MergedAdapter, merged_into

log = logging.getLogger("heddle.parity")
MOST_TOKENS = 256  # twice their logits are kept, in float32: 300 MiB for a vocabulary of 150 thousand
NOT_FINITE = "the model's output is not finite with this adapter"


class AdapterToMerge(MergedAdapter, Protocol):
    """One whose files are read while others are served."""

    def is_ready(self) -> bool:
        """Before that, nothing of it may be asked."""

    def close(self) -> None: ...


class Prefills:
    """Lone prefills, with the logits of every token."""

    def __init__(self, forward: Forward, tables: AdapterTables, block_size: int) -> None:
        self._forward, self._tables, self._block_size = forward, tables, block_size

    def logits(self, prompt: Sequence[int], slot: Slot, blocks: Sequence[int]) -> Tensor:
        """[tokens, V] float32. Nothing is read of what was in the KV blocks."""
        lane = Request(0, [LaneSpec(list(prompt))], 0, Sampling()).first
        lane.slot, lane.block_table = slot, list(blocks)
        plan = [Scheduled(lane, 0, len(prompt), True)]
        logits = self._forward.all_logits(lay_out(plan, self._tables, self._block_size))
        return logits.to(torch.float32, copy=True)  # they are valid until the next step


class ParityChecker:
    """Implements the engine's Checker protocol."""

    def __init__(
        self,
        model: nn.Module,
        experts: Sequence[RoutedExperts],
        prefills: Prefills,
        open_adapter: Callable[[AdapterRef], AdapterToMerge],
        most_tokens: int,
        vocab_size: int,
    ) -> None:
        """most_tokens: of a step, and of the model's context."""
        self._model, self._experts, self._prefills, self._open = model, experts, prefills, open_adapter
        self._most_tokens, self._vocab_size = min(most_tokens, MOST_TOKENS), vocab_size

    def refusal(self, num_tokens: int) -> str | None:
        if num_tokens <= self._most_tokens:
            return None
        return f"a check of {num_tokens} tokens; at most {self._most_tokens} are compared"

    def compare(self, ref: AdapterRef, num_tokens: int) -> "Comparison":
        # the same for every adapter; any id that the model has rows for
        prompt = random.Random(num_tokens).choices(range(self._vocab_size), k=num_tokens)
        return Comparison(self._prefills, prompt, self._merged, lambda: self._open(ref))

    def _merged(self, adapter: MergedAdapter) -> AbstractContextManager[None]:
        return merged_into(self._model, self._experts, adapter)


class Comparison:
    """Implements the engine's."""

    def __init__(
        self,
        prefills: Prefills,
        prompt: Sequence[int],
        merged: Callable[[MergedAdapter], AbstractContextManager[None]],
        open_adapter: Callable[[], AdapterToMerge],
    ) -> None:
        self._prefills, self._prompt = prefills, prompt
        self._merged, self._open = merged, open_adapter
        self._served: Tensor | None = None  # logits
        self._adapter: AdapterToMerge | None = None

    @torch.inference_mode()
    def run_adapter(self, slot: Slot, blocks: Sequence[int]) -> None:
        self._served = _finite(self._prefills.logits(self._prompt, slot, blocks))
        self._adapter = self._open()  # from now on it is read

    def is_ready(self) -> bool:
        return self._adapter is not None and self._adapter.is_ready()

    @torch.inference_mode()
    def run_merged(self, blocks: Sequence[int]) -> Found:
        assert self._served is not None and self._adapter is not None
        try:
            with self._merged(self._adapter):
                merged = _finite(self._prefills.logits(self._prompt, BASE_SLOT, blocks))
        except OSError as error:  # its text would show the path
            raise CheckFailed(f"its files cannot be read again: {error.strerror}") from error
        except (EOFError, ValueError) as error:
            raise CheckFailed(f"its files cannot be read again: {error}") from error
        except RuntimeError as error:  # merging takes memory that serving does not: that is no reason to end the engine
            log.exception("an adapter could not be merged")
            raise CheckFailed(f"it could not be merged: {str(error).partition(chr(10))[0]}") from error
        finally:
            self._adapter.close()
        return Found(float((self._served - merged).abs().max()), float(merged.abs().max()))


def _finite(logits: Tensor) -> Tensor:
    if not bool(logits.isfinite().all()):
        raise CheckFailed(NOT_FINITE)
    return logits
