"""How the prompts of those who run share a step."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from server.engine.queue import WaitingQueue
from server.engine.request import Request


class Load(NamedTuple):
    """What a step will have to do, as far as its budget depends on it."""

    decodes: int  # lanes that want their next token
    prompts: int  # requests that have more than that to compute, or could start
    due: int  # of these, requests whose adapters were not served more than others that run
    position: float  # tokens of a prompt that are computed, on average


def load(
    running: Sequence[Request], num_lanes: int, num_startable: int, next_one: Request | None, ahead: Collection[str]
) -> Load:
    """Of those who run, `num_lanes` in all, and of so many who wait and could start, `next_one` first. ahead: adapters
    that were served more than others that run."""
    prompts = [request for request in running if request.is_in_prompt]
    decodes = num_lanes - sum(len(request.lanes) for request in prompts)
    computed = sum(lane.num_computed_tokens for request in prompts for lane in request.lanes)
    count, due = len(prompts) + num_startable, sum(request.account not in ahead for request in prompts)
    if next_one is not None and next_one.account not in ahead:  # else nobody waits who was served less
        due += num_startable
    return Load(decodes, count, due, computed / max(1, count))


def in_turn(running: Sequence[Request], served: Callable[[str], float]) -> list[Request]:
    """In order of admission, but prompts among themselves by how many tokens their adapters were served.

    The first is of the adapter that was served the least, and of its prompts the one that is nearest to its end: so a
    short one does not wait until longer ones are through. Prompts leave each other halves (`chunk`), so an adapter's
    oldest has a quarter of what is left for it at least, however many short ones come.
    """
    prompts = [request for request in running if request.is_in_prompt]
    if not prompts:
        return list(running)
    first = min(prompts, key=lambda it: (served(it.account), it.num_uncomputed_tokens))
    others = iter(sorted((it for it in prompts if it is not first), key=lambda it: served(it.account)))
    return [first, *(next(others) if it.is_in_prompt else it for it in running if it is not first)]


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
