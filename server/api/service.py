"""What every route needs, passed in once."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import ParamSpec, Self, TypeVar

from fastapi import Request

from adapters_store.catalog import Catalog
from adapters_store.sources.fetcher import Fetcher
from adapters_store.uploads import Uploads
from server.api.protocol.body import BodyLimits
from server.api.texts.adapter_texts import AdapterTexts
from server.api.texts.chat_template import Conversation
from server.api.texts.text import Text
from server.config import ServerConfig
from server.engine.client import EngineClient
from server.engine.messages import EngineInfo
from server.errors import EngineSilent, InvalidRequest, Overloaded, ShuttingDown
from server.grammars.compiler import Compiler
from server.lifecycle.leases import Lease
from server.lifecycle.lifecycle import Lifecycle
from server.lifecycle.models import Meant, meaning_of
from server.metrics import Metrics

_LONG_TEXT = 10_000  # characters: about 10 ms to tokenize
_MOST_QUEUED = 8_000_000  # characters: about 4 s of tokenizing
_MESSAGE = 100  # rendering a message of a conversation is as much work as tokenizing so many characters
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass
class Service:
    """Also the one place where requests are admitted and long texts leave the event loop."""

    config: ServerConfig
    info: EngineInfo
    client: EngineClient
    lifecycle: Lifecycle
    uploads: Uploads
    fetcher: Fetcher
    texts: AdapterTexts
    metrics: Metrics
    grammars: Compiler
    started: int  # Unix time, seconds
    is_draining: bool = False
    _admitted: int = 0  # sequences that the engine does not have yet
    _queued_chars: int = 0  # of long texts that wait for their thread, or are in it
    _long_texts: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "long-texts"))

    @property
    def catalog(self) -> Catalog:
        return self.lifecycle.catalog

    @property
    def text(self) -> Text:
        """The base's."""
        return self.texts.for_template(None)

    def meaning_of(self, model: str, user: str | None = None) -> Meant:
        """What this model name means now. Raises NotFound and AdapterQuarantined."""
        return meaning_of(model, self.catalog, user)

    def lease(self, meant: Meant, num_sequences: int) -> Lease:
        """What was meant stays until the lease ends. Raises TooManyOfAdapter."""
        return self.lifecycle.leases.take(meant.ref, num_sequences, meant.manifest.max_concurrent)

    async def encode(self, texts: Sequence[str], param: str, add_special_tokens: bool = True) -> list[list[int]]:
        """Tokens of each text."""
        num_chars, most = sum(map(len, texts)), self.text.most_chars(self.max_request_tokens)
        if num_chars > most:
            raise InvalidRequest(
                f"all prompts together have {num_chars:,} characters; at most {most:,} are served", param=param
            )
        return await self._off_the_loop(
            num_chars, self.text.encode, texts, self.info.max_model_len, param, add_special_tokens
        )

    async def encode_chat(self, conversation: Conversation, chat_template: str | None) -> list[int]:
        """Tokens of a conversation. `chat_template` None: the base's."""
        num_chars = conversation.num_chars + _MESSAGE * len(conversation.messages)
        if chat_template is not None:  # an adapter's: a stranger wrote it, and it may take its time
            num_chars = max(num_chars, _LONG_TEXT)
        encode = partial(_encode_chat, self.texts, chat_template, conversation, self.info.max_model_len)
        return await self._off_the_loop(num_chars, encode)

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text that they stand for, special tokens included."""
        return await self._off_the_loop(len(tokens), self.text.decode, tokens)

    async def words(self, tokens: Sequence[int]) -> list[str]:
        """Each as the vocabulary spells it."""
        return await self._off_the_loop(len(tokens), self.text.words, tokens)

    async def _off_the_loop(
        self, num_chars: int, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Work on long texts goes to one thread: it takes no more than one core from the engine. What has not begun
        when its client leaves is not done. Raises Overloaded where more texts wait than are tokenized in seconds."""
        if num_chars < _LONG_TEXT:
            return work(*args, **kwargs)
        if self._queued_chars and self._queued_chars + num_chars > _MOST_QUEUED:
            raise Overloaded(f"{self._queued_chars:,} characters wait to be tokenized; {_MOST_QUEUED:,} may")
        self._queued_chars += num_chars
        try:
            return await asyncio.get_running_loop().run_in_executor(self._long_texts, partial(work, *args, **kwargs))
        finally:
            self._queued_chars -= num_chars

    def admit(self, num_sequences: int) -> "Admission":
        """Room for so many sequences; taken before any work is done for them, so that work cannot pile up.

        Raises EngineDead, EngineSilent, ShuttingDown, InvalidRequest or Overloaded.
        """
        if self.is_draining:
            raise ShuttingDown
        self.client.require_alive()
        if self.is_silent:
            raise EngineSilent(f"the engine has said nothing for {self.client.silence_s:.0f} s")
        if num_sequences > self.config.max_sequences:
            raise InvalidRequest(
                f"{num_sequences:,} completions in one request; at most {self.config.max_sequences:,} are served"
            )
        limit, under_way = self.config.max_concurrent_requests, self.client.num_requests + self._admitted
        if under_way + num_sequences > limit:
            raise Overloaded(f"{under_way:,} completions are under way; at most {limit:,} are taken at once")
        return Admission(self, num_sequences)

    @property
    def is_silent(self) -> bool:
        return self.client.silence_s > self.config.engine_silence_s

    @cached_property
    def body_limits(self) -> BodyLimits:
        it = self.config
        return BodyLimits(
            max_model_len=self.info.max_model_len,
            vocab_size=self.info.vocab_size,
            max_prompts=it.max_prompts,
            max_n=it.max_n,
            max_stop=it.max_stop,
            max_stop_chars=it.max_stop_chars,
            max_messages=it.max_messages,
            max_parts=it.max_parts,
            max_logprobs=it.max_logprobs,
            max_tools=it.max_tools,
        )

    @property
    def max_request_tokens(self) -> int:
        """Prompt and completion tokens that all sequences of one HTTP request may come to."""
        derived = max(self.info.kv_cache_tokens, self.config.max_n * self.info.max_model_len)
        return self.config.max_request_tokens or derived


def _encode_chat(
    texts: AdapterTexts, chat_template: str | None, conversation: Conversation, max_tokens: int
) -> list[int]:
    return texts.for_template(chat_template).encode_chat(conversation, max_tokens)


class Admission:
    """Room for some sequences until the engine has them, or the request has failed before."""

    def __init__(self, service: Service, num_sequences: int) -> None:
        self._service, self._num_sequences = service, num_sequences
        service._admitted += num_sequences

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Safe at any time, any number of times."""
        self._service._admitted -= self._num_sequences
        self._num_sequences = 0


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service
