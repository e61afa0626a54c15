"""POST /v1/completions.

A request's way: parse and refuse (bodies, protocol) -> what it wants (wanted) -> room for it, and prompt to tokens
(planned) -> sizes and seeds (generation.plan) -> engine client -> pieces of text -> one JSON body, or events (answers).
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import msgspec
from fastapi import APIRouter, Request, Response

from server.api.generating.answers import Shape, answer, prompt_logprobs
from server.api.generating.choice import Piece, TokenTold
from server.api.generating.generation import Completed, Generation
from server.api.generating.planned import Prompts, planned
from server.api.generating.told import joined
from server.api.operation import operation, streamed
from server.api.protocol.answers.generation import Completion, CompletionChunk
from server.api.protocol.completions import CompletionBody
from server.api.protocol.wanted import Wanted
from server.api.service import Service, service_of
from server.api.texts.decoding import Decoder, TokenTexts
from server.api.transport.bodies import read_body
from server.engine.request import Logprobs, OfPrompt
from server.lifecycle.models import Meant

router = APIRouter()
DEFAULT_TOKENS = 16  # OpenAI's default for /v1/completions; chat may fill the context
_AT_ONCE = 500  # tokens that are worded before others have their turn


@router.post(
    "/v1/completions",
    openapi_extra=operation(
        {200: streamed(Completion, CompletionChunk)}, takes=CompletionBody, refuses=(404, 422, 429, 504)
    ),
)
async def completions(request: Request) -> Response:
    service, body = service_of(request), await read_body(request, CompletionBody)
    meant = service.meaning_of(body.model, body.who)  # an unknown model is the first thing to say
    prompts = Prompts(body.prompt, "prompt", body.add_special_tokens is not False)
    async with planned(request, wanted(body, meant), prompts) as generation:
        shape = CompletionShape(meant, service, body, generation.prompts)
        return await answer(request, generation, shape, bool(body.stream), body.include_usage)


def wanted(body: CompletionBody, meant: Meant) -> Wanted:
    default = None if meant.manifest.sampling.max_tokens else DEFAULT_TOKENS
    echoed = body.logprobs if body.echo else None
    of_prompt = [num for num in (body.prompt_logprobs, echoed) if num is not None]
    wanted = body.wanted(
        meant,
        max_tokens=default if body.max_tokens is None else body.max_tokens,
        best_of=body.best_of or body.n or 1,
        num_logprobs=body.logprobs,
        of_prompt=OfPrompt(max(of_prompt)) if of_prompt else None,
    )
    return replace(wanted, times_prompt_is_told=len(of_prompt))


class CompletionShape(Shape):
    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, meant: Meant, service: Service, body: CompletionBody, prompts: Sequence[list[int]]) -> None:
        super().__init__(meant)
        self._texts, self._body, self._prompts = service.text.token_texts, body, prompts
        self._text = service.text
        self._skips = body.skip_special_tokens is not False
        self._echoes = [
            it if isinstance(it, str) else service.text.decode(it, self._skips) for it in body.prompt if body.echo
        ] or [""] * len(prompts)
        self._echoed: dict[int, _Worded] = {}  # what is told of prompts, by place
        # in a stream it comes with the first choice of a prompt, and the others wait for it
        self._waiting: dict[int, list[Piece]] = {}

    async def whole(self, completed: Sequence[Completed], generation: Generation) -> dict[str, object]:
        choices: list[dict[str, object]] = []
        for place, prompt in enumerate(self._prompts):
            own = completed[place * generation.wanted.per_prompt : (place + 1) * generation.wanted.per_prompt]
            told = None if own[0].of_prompt is None else own[0].of_prompt.logprobs
            more: dict[str, object] = {}
            if told is not None and self._body.prompt_logprobs is not None:
                more["prompt_logprobs"] = await prompt_logprobs(
                    prompt, _cut(told, self._body.prompt_logprobs), self._texts
                )
            await self._word_prompt(place, told)
            if len(own) > generation.wanted.n:
                own = sorted(own, key=lambda it: it.mean_logprob, reverse=True)[: generation.wanted.n]
            for it in own:
                logprobs = await self._all_logprobs(place, it.tokens)
                text = self._echoes[place] + it.text
                choices.append(self._choice(len(choices), text, it.finish, it.stop, logprobs) | more)
        return self.body(self.object_name, choices)

    async def ready(self, piece: Piece) -> Sequence[Piece]:
        place = self._place(piece)
        if piece.of_prompt is not None:
            await self._word_prompt(place, piece.of_prompt.logprobs)
            return [piece, *self._waiting.pop(place, [])]
        if self._echoes_logprobs and place not in self._echoed:
            self._waiting.setdefault(place, []).append(piece)
            return []
        return (piece,)

    def chunk_choice(self, piece: Piece, is_first: bool) -> dict[str, object]:
        place = self._place(piece)
        text = self._echoes[place] + piece.text if is_first else piece.text
        logprobs: dict[str, object] | None = None
        if self._body.logprobs is not None:
            worded = self._begun(place) if is_first else self._words()
            for it in piece.tokens:
                worded.add(it.id, it.logprobs, len(self._echoes[place]) + it.offset)
            logprobs = worded.body()
        return self._choice(piece.index, text, piece.finish, piece.stop, logprobs)

    def _place(self, piece: Piece) -> int:
        """Of its prompt."""
        return piece.index // (self._body.n or 1)

    @staticmethod
    def _choice(
        index: int, text: str, finish: str | None, stop: str | int | None, logprobs: dict[str, object] | None
    ) -> dict[str, object]:
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": logprobs, "stop_reason": stop}

    @property
    def _echoes_logprobs(self) -> bool:
        return bool(self._body.echo) and self._body.logprobs is not None

    async def _word_prompt(self, place: int, told: Sequence[Logprobs] | None) -> None:
        """If it is echoed with log-probabilities; the first token has none."""
        if not self._echoes_logprobs:
            return
        words, decoder, offset = self._words(), self._decoder_of(place), 0
        for count, (token, it) in enumerate(zip(self._prompts[place], (None, *(told or [])), strict=True)):
            words.add(token, it, offset)
            offset += len(decoder.push(token))
            if count % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)
        self._echoed[place] = words

    async def _all_logprobs(self, place: int, tokens: Sequence[TokenTold]) -> dict[str, object] | None:
        if self._body.logprobs is None:
            return None
        worded = self._begun(place)
        for count, it in enumerate(tokens):
            worded.add(it.id, it.logprobs, len(self._echoes[place]) + it.offset)
            if count % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)
        return worded.body()

    def _words(self) -> "_Worded":
        return _Worded(self._texts, self._body.logprobs or 0)

    def _begun(self, place: int) -> "_Worded":
        """With the echoed prompt, if there is one."""
        return self._echoed[place].copy() if place in self._echoed else self._words()

    def _decoder_of(self, place: int) -> Decoder:
        """One that makes the echoed text of the prompt. A text is echoed as it was sent, which may spell control
        tokens, and may not have those that the tokenizer puts around it."""
        echo = self._echoes[place]
        spells = isinstance(self._body.prompt[place], str) and self._text.decode(self._prompts[place]) == echo
        return self._text.decoder(self._skips and not spells)


class _Worded:
    """OpenAI's parallel lists. The most probable tokens are encoded as they come: they are most of it."""

    def __init__(self, texts: TokenTexts, num: int) -> None:
        self._texts, self._num = texts, num
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[bytes] = []
        self._offsets: list[int] = []

    def copy(self) -> "_Worded":
        it = _Worded(self._texts, self._num)
        it._tokens, it._logprobs = list(self._tokens), list(self._logprobs)
        it._top, it._offsets = list(self._top), list(self._offsets)
        return it

    def add(self, token: int, it: Logprobs | None, offset: int) -> None:
        """`it` None: nothing comes before it that could tell."""
        text = self._texts.of(token).text
        self._tokens.append(text)
        self._offsets.append(offset)
        self._logprobs.append(None if it is None else it.chosen)
        top: dict[str, float] = {}
        if it is not None and self._num:
            for other, logprob in zip(it.ids[: self._num], it.top[: self._num], strict=True):
                top.setdefault(self._texts.of(other).text, logprob)  # two tokens may read alike: the likelier counts
            top.setdefault(text, it.chosen)
        self._top.append(msgspec.json.encode(top or None))

    def body(self) -> dict[str, object]:
        return {"text_offset": self._offsets, "token_logprobs": self._logprobs, "tokens": self._tokens,
                "top_logprobs": joined(self._top) if self._num else None}  # fmt: skip


def _cut(told: Sequence[Logprobs], num: int) -> list[Logprobs]:
    return [Logprobs(it.chosen, it.rank, it.ids[:num], it.top[:num]) for it in told]
