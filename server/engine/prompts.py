"""How the prompts of those who run share a step."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from server.engine.queue import WaitingQueue
from server.engine.request import Request


class Load(NamedTuple):
    """What a step will have to do, as far as its budget depends on it."""

    decodes: int  # lanes that want their next token
    prompts: int  # requests that have more than that to compute, or could start
    position: float  # tokens of a prompt that are computed, on average


def load(running: Sequence[Request], num_lanes: int, num_startable: int) -> Load:
    """Of those who run, `num_lanes` in all, and of so many who wait."""
    prompts = [request for request in running if request.is_in_prompt]
    decodes = num_lanes - sum(len(request.lanes) for request in prompts)
    computed = sum(lane.num_computed_tokens for request in prompts for lane in request.lanes)
    count = len(prompts) + num_startable
    return Load(decodes, count, computed / max(1, count))


def in_turn(running: Sequence[Request]) -> list[Request]:
    """In order of admission, but for the prompt that is nearest to its end.

    It is served first, so that a short one does not wait until longer ones are through. Prompts leave each other halves
    (`chunk`), so the oldest has a quarter of the budget at least, however many short ones come.
    """
    prompts = (request for request in running if request.is_in_prompt)
    nearest = min(prompts, key=lambda it: it.num_uncomputed_tokens, default=None)
    if nearest is None:
        return list(running)
    return [nearest, *(request for request in running if request is not nearest)]


def chunk(request: Request, budget: int, behind: Iterable[Request], waiting: WaitingQueue) -> int:
    """How many of its tokens a running request computes. A long prompt leaves half of the budget while another group's
    prompt stands `behind` it or waits, so that a short one does not wait until the long one is through."""
    needed, half = request.num_uncomputed_tokens, max(len(request.lanes), budget // 2)
    if needed <= half:
        return needed
    is_awaited = waiting.has_others(request.group) or any(
        other.group != request.group and other.is_in_prompt for other in behind
    )
    return half if is_awaited else min(needed, budget)
