"""Whether what is served is the model: some tokens through Transformers' modules, and through ours once they are in.

The first half runs before anything of ours is put in, and the second with everything in its place. Tokens are spread
over all positions that are served (spread.py), so whatever ours compute otherwise shows: rotary embeddings, windows,
norms, routers, layouts of experts, caches.

How much rounding may change is measured with the model itself, since it differs by orders of magnitude: Transformers'
modules compute the tokens twice more, each module's result a little off, up and down. That has chosen other experts,
too, wherever rounding can.
"""

import inspect
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from server.engine.plan import Scheduled
from server.engine.request import LaneSpec, Request, Sampling
from server.model.families import Foreign, UnsupportedModelError
from server.model.forward import Forward
from server.model.inputs import AdapterTables, lay_out
from server.model.masks import LayerMask, mask_of
from server.model.probe import Probed, attending
from server.model.spread import Run, Spread
from server.model.temperature import Temperature, temperatures_taken

# By how much each module's result is put off, in the spacing of its numbers; that of attention, which is computed in
# float32, also by one for each key, since a sum of many like terms may lose a part of that. In float32 ours differ by
# at most an eighth of what comes of it, and anything wrong by twenty times as much; in few bits by up to two thirds,
# where other experts were chosen, and by one and a half times as much (tests/model/test_self_check.py)
_OFF_IN_FLOAT32, _OFF_IN_FEW_BITS, _OFF_BY_KEY = 100.0, 5.0, 1.0
_FARTHEST = 1 << 17  # tokens: a context of ten million would take a CPU minutes
# of the tokens; where bits are few the last ones may have met other experts
_SHARES = {True: (0.25, 0.5, 0.75, 1.0), False: (0.25, 0.5, 0.75)}


_REMEDY = "Please report it with the model's config.json; --no-self-check serves it all the same"


class SelfCheckFailed(UnsupportedModelError):
    """What is served is not the model."""


class Agreement(NamedTuple):
    """Logits of so many tokens, up to a position, differ by a part of their size, and rounding explains the other."""

    num_tokens: int
    last_position: int
    found: float
    allowed: float
    seconds: float


class SelfCheck:
    """Made from a model as Transformers loaded it. Then ours are put in, and it is compared."""

    def __init__(self, model: Foreign, probed: Probed, length: int, block_size: int) -> None:
        """length: of the longest sequence that is served."""
        began = time.perf_counter()
        self._spread = Spread(min(length, _FARTHEST), block_size)
        # the same each time; any ids that the model has rows for
        self._token_ids = random.Random(0).choices(range(model.config.vocab_size), k=len(self._spread))
        self._what = _what(model, probed)
        self._is_float32 = next(model.parameters()).dtype == torch.float32
        plain, *off = _plain_logits(model, probed, self._spread, self._token_ids)
        if not bool(plain.isfinite().all()):
            raise SelfCheckFailed(
                f"this model's logits are not finite as Transformers computes them ({self._what}): its weights are "
                "broken, or overflow in this type; try --dtype float32. --no-self-check serves it as it is"
            )
        self._plain = plain.clone()  # else the others would be kept with it
        self._rounding = torch.stack([_differences(it, self._plain) for it in off]).amax(0)
        self._seconds = time.perf_counter() - began

    @property
    def num_tokens(self) -> int:
        return len(self._spread)

    @property
    def num_blocks(self) -> int:
        return self._spread.num_blocks

    @property
    def length(self) -> int:
        """Of the longest sequence that it computes."""
        return 1 + max(self._spread.positions)

    def compare(self, forward: Forward, tables: AdapterTables, blocks: Sequence[int]) -> Agreement:
        """Raises SelfCheckFailed. Nothing is read of what was in the KV blocks."""
        began = time.perf_counter()
        try:
            served = _served_logits(forward, tables, self._spread, self._token_ids, blocks)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise SelfCheckFailed(
                f"the self-check could not compute this model ({self._what}): {type(error).__name__}: {error}. "
                f"{_REMEDY}"
            ) from error
        found, allowed = self._judge(_differences(served, self._plain))
        seconds = self._seconds + time.perf_counter() - began
        return Agreement(self.num_tokens, max(self._spread.positions), found, allowed, seconds)

    def _judge(self, differences: Tensor) -> tuple[float, float]:
        """What was found, and what rounding explains: of that share of the tokens where these are farthest apart."""
        shares = torch.tensor(_SHARES[self._is_float32])
        found, allowed = torch.quantile(differences, shares), torch.quantile(self._rounding, shares)
        if bool((found <= allowed).all()):  # it is not where anything is no number
            at = int((found / allowed).nan_to_num(0.0).argmax())
            return float(found[at]), float(allowed[at])
        at = int((found / allowed).nan_to_num(torch.inf).argmax())
        position = self._spread.positions[int(differences.nan_to_num(torch.inf).argmax())]
        raise SelfCheckFailed(
            f"the self-check found that this model would not be computed as Transformers does it: logits of "
            f"{self.num_tokens} tokens differ by {float(found[at]):.2g} of their size, where rounding explains "
            f"{float(allowed[at]):.2g}, and most at position {position} of {max(self._spread.positions)} "
            f"({self._what}). {_REMEDY}"
        )


def _differences(logits: Tensor, plain: Tensor) -> Tensor:
    """[tokens] of each token's logits, as a part of their size around their mean: the mean does not matter to any
    choice. NaN where something is no finite number."""
    size = (plain - plain.mean(1, keepdim=True)).norm(dim=1)
    least = plain.norm(dim=1) * 1e-4 + torch.finfo(torch.float32).tiny  # where all are alike
    parts: Tensor = (logits - plain).norm(dim=1) / size.maximum(least)
    return parts


def _what(model: Foreign, probed: Probed) -> str:
    """The model and the kinds of its layers, for whoever is told of a failure."""
    kinds = Counter(it.visible for it in probed.attention)
    return f"{model.config.model_type}; layers: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items())


# -- as Transformers computes ------------------------------------------------------------------


@torch.inference_mode()
def _plain_logits(model: Foreign, probed: Probed, spread: Spread, token_ids: Sequence[int]) -> list[Tensor]:
    """[tokens, V] float32, on the host: as they are, then with every result put off, up and down."""
    device = next(model.parameters()).device
    # in order of their positions: a model that counts tokens instead finds them in another order in our step
    order = torch.tensor(spread.positions).argsort(stable=True)
    off = _Off(len(spread))

    def copies(values: Tensor) -> Tensor:
        return values.expand(_Off.COPIES, -1).to(device)

    attentions = [it.module for it in probed.attention]
    with (
        temperatures_taken(attentions) as temperatures,
        attending(model, _attend(spread, order, off, temperatures)),
        off.at_modules(model),
    ):
        out = model(
            input_ids=copies(torch.tensor(token_ids)[order]),
            position_ids=copies(torch.tensor(spread.positions)[order]),
            attention_mask=copies(torch.ones(len(spread), dtype=torch.int64)),
            use_cache=False,
            logits_to_keep=torch.arange(len(spread), device=device),  # by name: some let go of the others on the way
        ).logits
    return list(out.float().cpu()[:, order.argsort()])


def _attend(
    spread: Spread, order: Tensor, off: "_Off", temperatures: Mapping[nn.Module, Temperature]
) -> Callable[..., tuple[Tensor, None]]:
    counts: dict[LayerMask, Tensor] = {}
    positions = torch.tensor(spread.positions)[order]

    def attend(module: Foreign, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
               **settings: object) -> tuple[Tensor, None]:  # fmt: skip
        """By the family's own function, in float32. A key that is seen n times has a score that is higher by log(n)."""
        mask = mask_of(attention_mask)
        if mask not in counts:
            counts[mask] = spread.counts(mask)[order][:, order].to(query.device)
        if (temperature := temperatures.get(module)) is not None:
            query = temperature(query.transpose(1, 2), positions.to(query.device)).transpose(1, 2)
        bias, num_keys = counts[mask].log()[None, None], counts[mask].sum(1)
        family = inspect.unwrap(type(module).forward).__globals__
        plain: Callable[..., tuple[Tensor, Tensor | None]] = family["eager_attention_forward"]
        out, _ = plain(module, query.float(), key.float(), value.float(), bias, **settings)
        return off(out, num_keys[:, None, None] * _OFF_BY_KEY).to(query.dtype), None

    return attend


class _Off:
    """Puts results for copies of the same tokens off: those for the first not at all, and those for the others by as
    much up as down."""

    COPIES = 3

    def __init__(self, tokens: int) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._rows = self.COPIES, self.COPIES * tokens
        self._signs = torch.tensor([0.0, 1.0, -1.0])

    def __call__(self, out: Tensor, spacings: Tensor | float) -> Tensor:
        """out [copies, ...] or [copies * tokens, ...]. spacings: of its numbers, for all that it can be off by."""
        if out.numel() == 0:  # shared experts of no width
            return out
        it = out.reshape(self.COPIES, -1, *out.shape[2:]) if len(out) == self.COPIES else out.reshape(self.COPIES, -1)
        part = (torch.rand(it.shape[1:], generator=self._generator) - 0.5).to(out.device)
        part = part * (spacings * torch.finfo(out.dtype).eps)
        signs = self._signs.to(out.device).view(-1, *[1] * part.dim())
        return (it.float() * (1 + signs * part)).to(out.dtype).view(out.shape)

    @contextmanager
    def at_modules(self, model: nn.Module) -> Iterator[None]:
        """Those that are called for some of the tokens only are left as they are."""

        def hook(_: nn.Module, __: object, out: object) -> Tensor | None:
            if not isinstance(out, Tensor) or not out.is_floating_point() or len(out) not in self._rows:
                return None
            return self(out, _OFF_IN_FLOAT32 if out.dtype == torch.float32 else _OFF_IN_FEW_BITS)

        leaves = [module for module in model.modules() if next(module.children(), None) is None]
        hooks = [module.register_forward_hook(hook) for module in leaves]
        try:
            yield
        finally:
            for it in hooks:
                it.remove()


# -- as ours do --------------------------------------------------------------------------------


@torch.inference_mode()
def _served_logits(
    forward: Forward,
    tables: AdapterTables,
    spread: Spread,
    token_ids: Sequence[int],
    blocks: Sequence[int],
) -> Tensor:
    """[tokens, V] float32, on the host: in one step, whose order is not that of their positions."""
    runs = random.Random(1).sample(spread.runs, len(spread.runs))
    plan = [_scheduled(run, [token_ids[row] for row in run.rows], spread.table(run, blocks)) for run in runs]
    served = forward.all_logits(lay_out(plan, tables, spread.block_size)).float().cpu()
    return served[torch.tensor([row for run in runs for row in run.rows]).argsort()]


def _scheduled(run: Run, token_ids: Sequence[int], table: list[int]) -> Scheduled:
    lane = Request(0, [LaneSpec([0] * run.start + list(token_ids))], 0, Sampling()).first
    lane.block_table = table
    return Scheduled(lane, run.start, len(token_ids), samples=False)
