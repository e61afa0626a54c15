"""Adapters whose outputs are no numbers, request after request, are put into quarantine.

Weights can be finite and still overflow with some prompts, so one such request says little; several in a row with none
between them that came to its end well say that it is the adapter.
"""

from collections import OrderedDict

from adapters_store.ref import AdapterRef
from server.engine.request import Fault, Request
from server.engine.residency import Residency

_TOO_OFTEN = 3
_MOST_REMEMBERED = 1024  # adapters, so that what no longer exists is forgotten some day


class Soundness:
    """Requests that ended because their logits were not finite, in a row, by revision."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._in_a_row: OrderedDict[AdapterRef, int] = OrderedDict()

    def failed(self, request: Request) -> Fault | None:
        """The request ends because its logits were not finite. Says whether that is its adapter's fault for certain.

        The base is never to blame, and where several lanes have adapters it is not known which of them is.
        """
        ref = _only_adapter(request)
        if ref is None:
            return None
        count = self._in_a_row[ref] = self._in_a_row.pop(ref, 0) + 1
        if len(self._in_a_row) > _MOST_REMEMBERED:
            self._in_a_row.popitem(last=False)
        if count < _TOO_OFTEN:
            return None
        # what is kept is not forgotten with this: once it is registered again, one more is enough
        self._residency.quarantine(ref, f"the model's output was not finite in {count} requests in a row")
        return Fault.QUARANTINED

    def ended_well(self, request: Request) -> None:
        ref = _only_adapter(request)
        if ref is not None:
            self._in_a_row.pop(ref, None)


def _only_adapter(request: Request) -> AdapterRef | None:
    adapters = request.adapters
    return adapters[0] if len(adapters) == 1 else None
