"""The residual stream between layers: what a layer adds to it last waits for the norm that reads the sum next.

A layer hands on the stream without its last part, which is kept here. Whoever is handed that tensor finds the part by
the tensor's identity. Nobody else may read it, so a model's layers do this only where all of them and the final norm
take part, and trying has shown that nothing else reads what they hand on (decoder_layers.py).
"""

from torch import Tensor

from server.model.linears import Deferred
from server.model.norms import RmsNorm


class ResidualStream:
    def __init__(self) -> None:
        self._handed: Tensor | None = None
        self._waiting: Deferred | None = None

    def begin(self, x: Tensor) -> None:
        """x: what the first layer of a step reads. A step that failed may have left something."""
        self._handed, self._waiting = x, None

    def hand_on(self, x: Tensor, added: Deferred) -> Tensor:
        self._handed, self._waiting = x, added
        return x

    def normed(self, x: Tensor, norm: RmsNorm) -> tuple[Tensor, Tensor]:
        """(the norm of the whole stream, that stream)."""
        assert x is self._handed, "somebody else reads the stream between layers"
        waiting, self._handed, self._waiting = self._waiting, None, None
        return (norm.of(x), x) if waiting is None else norm.of_sum(waiting, x)


class StreamEnd:
    """Takes the place of the forward of a model's final norm."""

    def __init__(self, norm: RmsNorm, stream: ResidualStream) -> None:
        self._norm, self._stream = norm, stream

    def __call__(self, x: Tensor) -> Tensor:
        return self._stream.normed(x, self._norm)[0]
