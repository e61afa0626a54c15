"""The front's side of grammars: processes that compile them, each killed when its time is up, its client has left, or
the server stops. The event loop only waits for them."""

import asyncio
import hashlib
import logging
import math
import time
from functools import partial

import msgspec

from adapters_store.worker import START_TIMEOUT_S, Busy, Closed, Turns, Worker, WorkerEnded
from server.errors import GrammarsUnavailable, InvalidRequest, Overloaded, ShuttingDown
from server.grammars import limits
from server.grammars.jobs import Answer, Compile, Compiled, Refused
from server.grammars.outcomes import Outcomes
from server.grammars.refused import GrammarRefused
from server.grammars.source import GrammarSource
from server.grammars.structure import check_structure
from server.grammars.vocabulary_spec import VocabularySpec

log = logging.getLogger("heddle.grammars")
_ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_ENVIRONMENT = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
SMALL_BYTES = 8 << 10
GIVEN_UP_S = 60.0  # for which a grammar is not tried again
_WHAT = {"json_schema": "the schema", "choice": "the list of choices"}  # others are grammars


class Compiler:
    """Compiles in two processes, `timeout_s` seconds each grammar at most from when its turn has come. Small ones, as
    most are, do not wait behind large ones.

    The first grammar starts the first of them. What became of a grammar is remembered, for a while where it was given
    up for want of time: the machine may have been busy.
    """

    def __init__(
        self,
        vocabulary: VocabularySpec,
        timeout_s: float = 1.0,
        max_bytes: int = 256 << 10,
        max_waiting: int = 64,
    ) -> None:
        """max_waiting: small ones that may wait, and large ones."""
        self._vocabulary, self._timeout_s, self._max_bytes = vocabulary, timeout_s, max_bytes
        self._small, self._large = Turns(1, max_waiting), Turns(1, max_waiting)
        self._idle: list[Worker[Answer]] = []
        self._outcomes = Outcomes(limits.CACHED_OUTCOMES, limits.CACHED_OUTCOME_BYTES)

    async def compiled(self, source: GrammarSource) -> str:
        """What the engine takes as a request's grammar. Raises InvalidRequest, for the source's `param` or the tools,
        GrammarsUnavailable, Overloaded and ShuttingDown. If the caller is cancelled, so is the work."""
        try:
            self._check_size(source)
            encoded = _encode(source)
            key = hashlib.blake2b(encoded, digest_size=32).digest()
            outcome = self._outcomes.get(key)
            if outcome is None:
                turns = self._small if len(encoded) <= SMALL_BYTES else self._large
                outcome = await turns.run(partial(self._compile, key, source))
        except GrammarRefused as refusal:
            outcome = Refused(refusal.message, refusal.code, refusal.is_of_tools)
        except Busy:
            raise Overloaded("as many grammars wait to be compiled as may; send the request again later") from None
        except Closed:
            raise ShuttingDown from None
        if isinstance(outcome, Refused):
            param = "tools" if outcome.is_of_tools else source.param
            raise InvalidRequest(outcome.message, param=param, code=outcome.code)
        return outcome.grammar

    async def close(self) -> None:
        """Kill whatever is under way; at once, and for good."""
        await asyncio.gather(self._small.close(), self._large.close())
        await asyncio.gather(*(worker.end() for worker in self._idle))
        self._idle.clear()

    def _check_size(self, source: GrammarSource) -> None:
        """Before any work is done for it. Raises GrammarRefused."""
        what = _WHAT.get(source.kind, "the grammar")
        # counted in bytes only where characters do not decide it
        size = len(source.text) if len(source.text) > self._max_bytes else _num_bytes(source.text)
        if size > self._max_bytes:
            raise GrammarRefused(
                f"{what} has {size:,} bytes; at most {self._max_bytes:,} are served (--max-grammar-bytes)"
            )
        if source.kind in ("json_schema", "choice"):
            check_structure(source.text, what)

    async def _compile(self, key: bytes, source: GrammarSource) -> Compiled | Refused:
        """Raises GrammarRefused where the model is not served so, and GrammarsUnavailable."""
        known = self._outcomes.get(key)  # it may have been compiled while this one waited for its turn
        if known is not None:
            return known
        worker, is_sound = await self._worker(), False
        job = msgspec.msgpack.encode(Compile(source, math.ceil(self._timeout_s) + 1))
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await worker.ask(job)
            is_sound = True
        except TimeoutError:
            return self._give_up(
                key,
                f"compiling the grammar took more than {self._timeout_s:g} s and was given up (--grammar-timeout-s); "
                "fewer alternatives, smaller bounds of repetitions and less nesting take less time",
            )
        except WorkerEnded:  # it was sound when it was asked, so that this grammar is the likely reason
            return self._give_up(
                key,
                "compiling the grammar ended the process that did it, for want of memory perhaps; a smaller one with "
                "less nesting needs less",
            )
        finally:
            if is_sound:
                self._idle.append(worker)
            else:
                await worker.end()
        assert isinstance(answer, Compiled | Refused)
        self._outcomes.put(key, answer)
        return answer

    def _give_up(self, key: bytes, reason: str) -> Refused:
        refused = Refused(reason, "unsupported_grammar")
        self._outcomes.put(key, refused, until=time.monotonic() + GIVEN_UP_S)
        return refused

    async def _worker(self) -> Worker[Answer]:
        """Raises GrammarsUnavailable, and GrammarRefused where the model is not served so."""
        while self._idle:
            worker = self._idle.pop()
            if worker.is_alive:
                return worker
            await worker.end()
        try:
            worker = await Worker.start("server.grammars.compile_process", _ANSWERS, _ENVIRONMENT)
        except (WorkerEnded, OSError) as error:  # a TimeoutError is an OSError
            raise _not_started(error) from None
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                told = await worker.ask(msgspec.msgpack.encode(self._vocabulary))
        except (WorkerEnded, OSError) as error:
            await worker.end()
            raise _not_started(error) from None
        except BaseException:
            await worker.end()
            raise
        if isinstance(told, Refused):
            await worker.end()
            raise GrammarRefused(f"structured output is not served with this model's tokenizer: {told.message}")
        return worker


def _not_started(error: Exception) -> GrammarsUnavailable:
    log.error("a process to compile a grammar did not start: %r", error)
    return GrammarsUnavailable(
        "the grammar could not be compiled, for the process that does it did not start; the server's log has the "
        "reason. Send the request again later, or without a grammar: those are served"
    )


def _encode(source: GrammarSource) -> bytes:
    try:
        return msgspec.msgpack.encode(source)
    except UnicodeEncodeError:
        raise GrammarRefused("it is not UTF-8: it has half of a surrogate pair", "invalid_grammar") from None


def _num_bytes(text: str) -> int:
    return len(text.encode(errors="surrogatepass"))
