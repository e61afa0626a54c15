"""A whole front on a real socket, with the real grammars, over a model that says what a test wants."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server.api.service import Service
from server.api.texts.adapter_texts import AdapterTexts
from server.api.texts.text import Text
from server.engine.core import Engine
from server.engine.fake_model import State, logprobs
from server.engine.fake_runner import FakeChecker, FakeRunner
from server.engine.kv_cache import KVCache
from server.engine.masks import Mask, MaskSource
from server.engine.plan import Output
from server.engine.request import Lane, Token, ToldOfPrompt
from server.engine.scheduler import SchedulerLimits
from server.grammars.compiler import Compiler
from server.grammars.source import GrammarSource
from server.lifecycle.registry import Registry
from tests.support.fake_server import BLOCK, BLOCKS, STOP, VOCAB, FakeServer
from tests.support.queue_link import QueueLink

# it reasons, writes tools, and calls them as Hermes does
TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for it in messages %}{{ it.role }}: "
    "{% if it.reasoning_content %}<think>{{ it.reasoning_content }}</think>{% endif %}{{ it.content }}"
    "{% for call in it.tool_calls or [] %}<tool_call>\n{{ {'name': call.function.name, 'arguments': "
    "call.function.arguments} | tojson }}\n</tool_call>\n{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


class Recorded:
    """`seen`: what was compiled."""

    def __init__(self, compiler: Compiler) -> None:
        self.seen: list[GrammarSource] = []
        self._compiler = compiler

    async def compiled(self, source: GrammarSource) -> str:
        self.seen.append(source)
        return await self._compiler.compiled(source)

    async def close(self) -> None:
        await self._compiler.close()


class ScriptedRunner(FakeRunner):
    """Completion number n of a request says text n of the script, or the last one. Where a grammar does not allow that,
    it says the next token by id that is allowed."""

    def __init__(self, masks: MaskSource) -> None:
        super().__init__(BLOCKS, BLOCK, VOCAB, masks)
        self.script: Sequence[Sequence[int]] = [[]]

    def _output(self, lane: Lane, state: State, told: ToldOfPrompt | None, masks: Mapping[int, Mask]) -> Output:
        request = lane.request
        if request.is_constrained and request.id not in masks:
            return Output(of_prompt=told, is_late=True)
        says = self.script[min(request.id - request.group, len(self.script) - 1)]
        token = says[request.num_generated] if request.num_generated < len(says) else STOP
        if request.is_constrained:
            allowed = int.from_bytes(masks[request.id], "little")
            token = next(it for it in (*range(token, VOCAB), *range(token)) if allowed >> it & 1)
        num = request.sampling.num_logprobs
        return Output((Token(token, None if num is None else logprobs(state, token, num, VOCAB)),), of_prompt=told)


class ScriptedServer(FakeServer):
    def __init__(self, root: Path, **settings: Any) -> None:
        super().__init__(root, frozenset({STOP}), **settings)
        self._runner = ScriptedRunner(self._masks)

    def says(self, *texts: str) -> None:
        """From now on, as the completions of each request."""
        self._runner.script = [self.service.text.encode([it], 10_000, "prompt")[0] for it in texts]

    def _engine(self) -> Engine:
        limits = SchedulerLimits(tokens_per_step=64, max_running=16, max_waiting=100, max_skips=20)
        return Engine(limits, KVCache(BLOCKS, BLOCK), self._runner, self.residency, FakeChecker(), self._masks)

    def _built(self, registry: Registry, link: QueueLink) -> Service:
        service = super()._built(registry, link)
        (self.root / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
        service.texts = AdapterTexts(Text.load(self.root / "model"))
        self.grammars: Any = Recorded(service.grammars)
        service.grammars = self.grammars
        return service
