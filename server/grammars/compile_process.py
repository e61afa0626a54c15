"""Compiles grammars for the front, which can kill it (compiler.py): `python -m server.grammars.compile_process`.

Who wrote a grammar is a stranger, and a short one can mean hours of work. So the process limits its memory and, lest
it outlive its parent, its time on the processor; the server limits the time.
"""

import json
import math
import resource

import msgspec
from llguidance import LLTokenizer
from msgspec.structs import replace

from adapters_store.worker_process import limit, serve
from server.grammars import gbnf, limits, matchers, vocabulary, words
from server.grammars.compose import composed, tool_schemas
from server.grammars.jobs import Answer, Compile, Compiled, Job, Refused, Told
from server.grammars.refused import GrammarRefused
from server.grammars.source import GrammarSource
from server.grammars.vocabulary_spec import VocabularySpec

_JOBS: msgspec.msgpack.Decoder[Job] = msgspec.msgpack.Decoder(Job)
NICENESS = 5  # less than of other workers: a request waits for its answer


class CompileProcess:
    """Told of the vocabulary first."""

    def __init__(self) -> None:
        self._vocabulary: LLTokenizer | None = None

    def answer(self, frame: bytes) -> bytes:
        return msgspec.msgpack.encode(self._answer(_JOBS.decode(frame)))

    def _answer(self, job: Job) -> Answer:
        if isinstance(job, VocabularySpec):
            try:
                self._vocabulary = vocabulary.load(job)
            except vocabulary.NoVocabulary as error:
                return Refused(str(error), "unsupported_grammar")
            return Told()
        limit(resource.RLIMIT_CPU, _cpu_seconds_spent() + job.cpu_seconds)
        try:
            return Compiled(self.compiled(job))
        except GrammarRefused as refusal:
            return Refused(refusal.message, refusal.code, refusal.is_of_tools)

    def compiled(self, job: Compile) -> str:
        """Raises GrammarRefused."""
        source = job.source
        grammar = composed(source, gbnf.in_lark)
        if source.before or source.opening or source.instead:
            # its first mask is that of what comes before it, or holds what may come instead
            self._try(composed(replace(source, before="", opening="", instead=""), gbnf.in_lark), source)
        self._try(grammar, source)
        return grammar

    def _try(self, grammar: str, source: GrammarSource) -> None:
        """What is too much at its first token, or leads nowhere, is refused now. Raises GrammarRefused."""
        try:
            self._make_first_mask(grammar)
        except matchers.Refusal as refusal:
            self._refuse_tools(source)
            has_its_places = source.kind == "ebnf" and not gbnf.is_gbnf(source.text)
            raise words.refusal(refusal.error, source.kind, has_its_places) from None

    def _refuse_tools(self, source: GrammarSource) -> None:
        """If the schema of a tool is the reason. Raises GrammarRefused."""
        for schema, served in tool_schemas(source):
            try:
                self._make_first_mask(json.dumps({"grammars": [{"json_schema": served}]}))
            except matchers.Refusal as refusal:
                raise words.refusal(refusal.error, "json_schema").of_tool(schema) from None

    def _make_first_mask(self, grammar: str) -> None:
        """Raises Refusal."""
        assert self._vocabulary is not None
        matcher = matchers.matcher_of(self._vocabulary, grammar)
        matcher.compute_bitmask()
        matchers.require_sound(matcher)


def _cpu_seconds_spent() -> int:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return math.ceil(spent.ru_utime + spent.ru_stime)


def main() -> None:
    limit(resource.RLIMIT_AS, limits.COMPILER_MEMORY_BYTES)
    serve(CompileProcess().answer, niceness=NICENESS)


if __name__ == "__main__":
    main()
