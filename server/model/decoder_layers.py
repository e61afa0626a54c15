"""Decoder layers that are h = x + attention(norm(x)), h + mlp(norm(h)): each sum and the norm after it in one launch.

Which layers these are is told by trying, and so is what the model's own loop does with what they return: layers that
hand on a part of the stream (residual.py) must be sure that only the next one reads it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from server.model.families import Foreign
from server.model.likeness import are_alike, are_identical, numbers, outcome, stand_in
from server.model.linears import Deferred
from server.model.norms import RmsNorm
from server.model.residual import ResidualStream

_TOKENS, _WIDTH = 3, 8  # of what layers are tried with


@runtime_checkable
class DefersItsEnd(Protocol):
    """A forward of ours whose last linear may leave to its reader what adapters add."""

    def deferred(self, x: Tensor, **given: Any) -> Deferred: ...


class Parts(NamedTuple):
    """Of a decoder layer. passed: arguments of the layer that its attention is given; constants: others that it is.
    has_more: the mlp returns a tuple, which begins with its result."""

    first_norm: RmsNorm
    attention: Foreign
    second_norm: RmsNorm
    mlp: Foreign
    passed: tuple[str, ...]
    constants: Mapping[str, Any]
    has_more: bool


class DecoderLayer:
    """Takes the place of a layer's forward. The layer keeps its modules."""

    def __init__(self, parts: Parts, stream: ResidualStream | None, is_first: bool) -> None:
        """stream: what is added last is left to the layer after this one, or to the final norm. None: it is not."""
        self._parts, self._stream, self._is_first = parts, stream, is_first
        self._attend_deferred = _deferred(parts.attention.forward)
        self._mlp_deferred = _deferred(parts.mlp.forward)

    def __call__(self, hidden_states: Tensor, **given: Any) -> Tensor:
        it, stream, x = self._parts, self._stream, hidden_states
        if stream is None:
            normed = it.first_norm.of(x)
        else:
            if self._is_first:
                stream.begin(x)
            normed, x = stream.normed(x, it.first_norm)
        normed, x = it.second_norm.of_sum(self._attended(normed, given), x)
        return (
            x + self._through_mlp(normed) if stream is None else stream.hand_on(x, self._through_mlp_deferred(normed))
        )

    def _attended(self, normed: Tensor, given: Mapping[str, Any]) -> Deferred:
        it = self._parts
        arguments = {**it.constants, **{name: given[name] for name in it.passed}}
        if self._attend_deferred is not None:
            return self._attend_deferred(normed, **arguments)
        return Deferred(it.attention(hidden_states=normed, **arguments)[0])

    def _through_mlp_deferred(self, normed: Tensor) -> Deferred:
        if self._mlp_deferred is not None:
            return self._mlp_deferred(normed)
        return Deferred(self._through_mlp(normed))

    def _through_mlp(self, normed: Tensor) -> Tensor:
        out: Any = self._parts.mlp(normed)
        result: Tensor = out[0] if self._parts.has_more else out
        return result.view(normed.shape)  # Llama 4's experts return rows


def _deferred(forward: object) -> Callable[..., Deferred] | None:
    """Asked once: to ask takes longer than a small op."""
    return forward.deferred if isinstance(forward, DefersItsEnd) else None


class Loop(NamedTuple):
    """How a model's body goes through its layers. given: what it calls each with, beside the hidden states.

    final: the norm that the last layer's result goes into, if nothing else reads what layers return; else None.
    """

    given: list[Mapping[str, Any]]
    final: RmsNorm | None


class _Tried(nn.Module):
    """Stands in for an attention or an mlp, and keeps what it is called with."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self._function = function
        self.arguments: tuple[Any, ...] = ()
        self.seen: Mapping[str, Any] = {}

    def forward(self, *arguments: Any, **named: Any) -> Any:
        self.arguments, self.seen = arguments, named
        return self._function(arguments[0] if arguments else named["hidden_states"])


@torch.inference_mode()
def parts_of(layer: Foreign, attention: nn.Module, given: Mapping[str, Any]) -> Parts | None:
    """Of a layer that is called with these arguments; None: it computes something else."""
    children = {name: it for name, it in layer.named_children() if not isinstance(it, nn.Dropout | nn.Identity)}
    norms = {name: it for name, it in children.items() if isinstance(it, RmsNorm)}
    others = [name for name, it in children.items() if name not in norms and it is not attention]
    own = [name for name, it in children.items() if it is attention]
    if len(norms) != 2 or len(others) != 1 or len(own) != 1:
        return None
    for first, second in (tuple(norms), tuple(norms)[::-1]):
        for has_more in (False, True):
            names = first, own[0], second, others[0]
            call = _is_plain(layer, names, given, has_more, torch.float32)
            if call is not None and call == _is_plain(layer, names, given, has_more, torch.bfloat16):
                return Parts(norms[first], attention, norms[second], children[others[0]], *call, has_more)
    return None


def _is_plain(
    layer: Foreign, names: tuple[str, ...], given: Mapping[str, Any], has_more: bool, dtype: torch.dtype
) -> tuple[tuple[str, ...], Mapping[str, Any]] | None:
    """What its attention is passed, and with which constants, if norms, attention and mlp have these names.

    In bfloat16 its sums must be ours to the bit: a stream that is wider between them, or after them, is another one.
    """

    def attend(x: Tensor) -> Tensor:
        return torch.tanh(x) * 2

    def pass_through(x: Tensor) -> Tensor:
        return torch.sin(3 * x)

    first, second = _Tried(lambda x: 1.5 * x + 0.25), _Tried(lambda x: 0.5 - x)
    attention = _Tried(lambda x: (attend(x), None))
    mlp = _Tried(lambda x: (pass_through(x), None) if has_more else pass_through(x))
    x = numbers(1, _TOKENS, _WIDTH, dtype=dtype)
    x[:, 0] *= 1000  # for limits to show
    tried = stand_in(layer, dict(zip(names, (first, attention, second, mlp), strict=True)))
    result = outcome(lambda: type(layer).forward(tried, x, **given))
    h = x + attend(1.5 * x + 0.25)
    ours = h + pass_through(0.5 - h)
    is_same = are_alike(result, ours) if dtype is torch.float32 else are_identical(result, ours)
    if not is_same or attention.arguments or len(mlp.arguments) != 1:
        return None
    seen = {name: it for name, it in attention.seen.items() if name != "hidden_states"}
    passed = tuple(name for name, it in seen.items() if name in given and it is given[name])
    constants = {name: it for name, it in seen.items() if name not in passed}
    return (passed, constants) if all(it is None or isinstance(it, bool) for it in constants.values()) else None


@torch.inference_mode()
def loop_of(body: Foreign, layers: Sequence[Foreign]) -> Loop | None:
    """Told by running it with stand-ins for its layers, whose results are no numbers: they would show in the body's.

    None: it does not call its layers in turn, each with the hidden states as the only argument without a name.
    """
    calls: list[tuple[int, Tensor, Tensor, Mapping[str, Any]]] = []  # which, what it was given and has returned
    ends: list[RmsNorm] = []
    known = set().union(*(set(layer.modules()) for layer in layers))
    norms = [it for it in body.modules() if isinstance(it, RmsNorm) and it not in known]

    def as_layer(index: int) -> Any:
        def forward(x: Tensor, **given: Any) -> Tensor:
            calls.append((index, x, torch.full_like(x, torch.nan), given))
            return calls[-1][2]

        return forward

    def as_norm(norm: RmsNorm) -> Any:
        def forward(x: Tensor) -> Tensor:
            if not calls or x is not calls[-1][2]:
                return norm.of(x)
            ends.append(norm)
            return torch.zeros_like(x)

        return forward

    with _instead({it: as_layer(index) for index, it in enumerate(layers)} | {it: as_norm(it) for it in norms}):
        tokens = torch.arange(_TOKENS, device=next(body.parameters()).device)[None]
        out = outcome(lambda: body(input_ids=tokens, position_ids=tokens, use_cache=False))
    if out is None or [index for index, *_ in calls] != list(range(len(layers))):
        return None
    is_direct = all(one[2] is other[1] for one, other in zip(calls, calls[1:], strict=False)) and len(ends) == 1
    is_alone = is_direct and bool(torch.isfinite(out.last_hidden_state).all())
    return Loop([given for *_, given in calls], ends[0] if is_alone else None)


class _instead:
    """These modules' forwards, for the length of a block."""

    def __init__(self, forwards: Mapping[Foreign, Any]) -> None:
        self._forwards = forwards

    def __enter__(self) -> None:
        self._before = {module: module.__dict__.get("forward") for module in self._forwards}
        for module, forward in self._forwards.items():
            module.forward = forward

    def __exit__(self, *_: object) -> None:
        for module, forward in self._before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
