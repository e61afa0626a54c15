"""The way of a request until the engine could have it: the same on every route that generates."""

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import cast

import msgspec
from fastapi import Request

from server.api.generating.generation import Generation, plan
from server.api.protocol.wanted import Wanted
from server.api.service import Service, service_of
from server.api.texts.chat_template import Conversation
from server.api.texts.speech import Formats, Speaker
from server.api.transport.sse import unless_client_leaves
from server.errors import InvalidRequest
from server.grammars.source import GrammarSource

_TAIL = 32  # tokens at a prompt's end, which show whether reasoning has begun there


@dataclass(frozen=True)
class Prompts:
    """All texts or all token ids, as the request's field `param` has them."""

    given: list[str] | list[list[int]]
    param: str
    add_special_tokens: bool


@asynccontextmanager
async def planned(request: Request, wanted: Wanted, said: Conversation | Prompts) -> AsyncIterator[Generation]:
    """A generation that is only to be begun, in room that it has for as long: room is there before any work is done.

    Raises ClientLeft, InvalidRequest, TooManyOfAdapter, and what `Service.admit` raises.
    """
    service, arrived = service_of(request), time.monotonic()
    num_sequences = (len(said.given) if isinstance(said, Prompts) else 1) * wanted.per_prompt
    with service.admit(num_sequences) as admission, service.lease(wanted.meant, num_sequences) as lease:
        prompts = await _encoded(request, service, wanted, said)
        speaker = _speaker(service, wanted, said, prompts)
        source, grammar = _source(wanted, speaker), None
        if source is not None:
            _refuse_to_go_on(wanted, source)
            grammar = await unless_client_leaves(request, service.grammars.compiled(source))
        yield plan(service, wanted, prompts, admission, lease, arrived, speaker, grammar)


async def _encoded(
    request: Request, service: Service, wanted: Wanted, said: Conversation | Prompts
) -> Sequence[list[int]]:
    if isinstance(said, Conversation):
        encoding = service.encode_chat(said, wanted.meant.manifest.chat_template)
        return [await unless_client_leaves(request, encoding)]
    texts = [text for text in said.given if isinstance(text, str)]
    if not texts:
        return cast(list[list[int]], said.given)
    return await unless_client_leaves(request, service.encode(texts, said.param, said.add_special_tokens))


def _speaker(
    service: Service, wanted: Wanted, said: Conversation | Prompts, prompts: Sequence[list[int]]
) -> Speaker | None:
    """Raises InvalidRequest for tools that the chat template does not know."""
    if not isinstance(said, Conversation):
        return None
    manifest = wanted.meant.manifest
    formats = Formats(manifest.tool_format, manifest.reasoning_format)
    text = service.texts.for_template(manifest.chat_template)
    return text.speaker(said, prompts[0][-_TAIL:], wanted.tools, formats)


def _source(wanted: Wanted, speaker: Speaker | None) -> GrammarSource | None:
    """What the answers must spell, calls and reasoning included."""
    if speaker is None:
        return wanted.source
    must_call = wanted.tools is not None and wanted.tools.must_call
    if wanted.source is not None and not must_call:
        parts = {"before": speaker.before, "opening": speaker.opening, "instead": speaker.calls}
        return msgspec.structs.replace(wanted.source, **parts)
    return None if speaker.answer is None else GrammarSource("lark", speaker.answer, "tools", speaker.before)


def _refuse_to_go_on(wanted: Wanted, source: GrammarSource) -> None:
    if wanted.ignores_eos:
        raise InvalidRequest(
            f"ignore_eos is for answers that go on whatever they say, and {source.param} says where this one ends; "
            "send one of them",
            param="ignore_eos",
            code="invalid_value",
        )


@contextmanager
def in_words_of_the_route(names: Mapping[str, str]) -> Iterator[None]:
    """What is refused in here is refused by the route's own `names` for chat's and completions' fields."""
    try:
        yield
    except InvalidRequest as refusal:
        if refusal.param == "max_tokens" and refusal.param in names:
            refusal.message = refusal.message.replace(refusal.param, names[refusal.param])
        refusal.param = names.get(refusal.param or "", refusal.param)
        raise
