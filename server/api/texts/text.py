"""Text to tokens and back, without torch or Transformers: the tokenizer's own file, and the model's chat template."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Encoding, Tokenizer

from adapters_store.errors import InvalidManifest
from server.api.texts.calls.lark import Spelling
from server.api.texts.calls.listed import CALL_FORMATS
from server.api.texts.chat_template import ChatTemplate, Conversation
from server.api.texts.control_tokens import Twin
from server.api.texts.decoding import Decoder, TokenTexts
from server.api.texts.reasoning import REASONING_FORMATS, Reasoning
from server.api.texts.rehearsal import ToolUse
from server.api.texts.speaking import OneSpeaker
from server.api.texts.speech import AS_SHOWN, Formats, Speaker, ToolsWanted
from server.api.texts.template_sandbox import Sandbox
from server.errors import ConfigError, ContextExceeded, InvalidRequest


class Text:
    """The tokenizer and chat template of the base model, or an adapter's template with the same tokenizer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: str | None,
        special_tokens: Mapping[str, str],
        formats: Formats = AS_SHOWN,
    ) -> None:
        """formats: where the template does not show them."""
        self._formats = formats
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        self._sandbox, self._twin = Sandbox(), Twin(tokenizer)
        self._template: ChatTemplate | None = self._compiled(chat_template) if chat_template else None
        self.token_texts, self._spelling = TokenTexts(tokenizer), Spelling(tokenizer)

    def with_template(self, template: str) -> "Text":
        """The same with an adapter's chat template. Raises InvalidManifest for one that does not compile, and for one
        that fails on a plain message of a user.

        Takes milliseconds, and on a base without a template, the first time, as long as its tokenizer does to load.
        """
        text = copy.copy(self)
        text._formats = AS_SHOWN  # the base's are for the base's template
        try:
            text._template = self._compiled(template)
            text.render_chat(Conversation([{"role": "user", "content": "Hello."}]))
        except InvalidRequest as error:
            raise InvalidManifest(
                f"the adapter's chat template fails on a plain message of a user: {error.message}; correct it"
            ) from None
        except Exception as error:  # a deep one is too much for Python's compiler, in several ways
            reason = str(error) if isinstance(error, TemplateError) else type(error).__name__
            raise InvalidManifest(f"the adapter's chat template is broken: {reason}; correct it") from None
        return text

    def _compiled(self, template: str) -> ChatTemplate:
        return ChatTemplate(self._sandbox, self._twin, template, self._special_tokens)

    @classmethod
    def load(cls, model_dir: Path, formats: Formats = AS_SHOWN) -> "Text":
        file = model_dir / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(
                f"{model_dir.name!r} has no tokenizer.json; save the model's fast tokenizer there "
                "(AutoTokenizer.from_pretrained(…).save_pretrained(…))"
            )
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"tokenizer.json of {model_dir.name!r} cannot be read: {error}") from None
        try:
            config = _read_json(model_dir / "tokenizer_config.json")
            template = _template_in(model_dir, config)
            if isinstance(template, list):  # several named ones
                template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
            tokens = ("bos_token", "eos_token", "pad_token")
            special = {name: _content(config[name]) for name in tokens if config.get(name)}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"tokenizer_config.json or the chat template of {model_dir.name!r} cannot be read: {error!r}"
            ) from None
        try:
            return cls(tokenizer, template, special, formats)
        except (TemplateError, RecursionError, SyntaxError, InvalidRequest) as error:
            raise ConfigError(f"the chat template of {model_dir.name!r} is broken: {error}") from None

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(
        self, texts: Sequence[str], max_tokens: int, param: str, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of each text. `param` is the request's field that they came in.

        Raises InvalidRequest for a text of more than `max_tokens`; one that cannot be so few costs nothing.
        """
        for text in texts:
            self._refuse_if_longer(len(text), max_tokens, param)
        return [_ids(it, max_tokens, param) for it in _encoded(self._tokenizer, texts, param, add_special_tokens)]

    def most_chars(self, num_tokens: int) -> int:
        """Characters that so many tokens can stand for."""
        return num_tokens * self._longest_token

    def _refuse_if_longer(self, num_chars: int, max_tokens: int, param: str) -> None:
        if num_chars > self.most_chars(max_tokens):
            told = f"it has {num_chars:,} characters, and {self.most_chars(max_tokens):,} are the most"
            raise ContextExceeded(f"the prompt is too long: {told}", max_tokens, param)

    def encode_chat(self, conversation: Conversation, max_tokens: int) -> list[int]:
        """Token ids of a conversation. Raises InvalidRequest as `encode` does, and where the template refuses it."""
        template = self._required_template()
        self._refuse_if_longer(conversation.num_chars, max_tokens, "messages")
        tokenizer, text = template.tokens_of(conversation, self._tokenizer)
        return _ids(_encoded(tokenizer, [text], "messages", add_special_tokens=False)[0], max_tokens, "messages")

    def render_chat(self, conversation: Conversation) -> str:
        """The text that the conversation becomes."""
        return self._required_template().render(conversation)

    def _required_template(self) -> ChatTemplate:
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        return self._template

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def words(self, tokens: Sequence[int]) -> list[str]:
        """Each token as the vocabulary spells it; nothing for one that it does not have."""
        return [self._tokenizer.id_to_token(token) or "" for token in tokens]

    def decoder(self, skip_special_tokens: bool = True, kept_tokens: frozenset[int] = frozenset()) -> Decoder:
        """kept_tokens: special ones that are not skipped."""
        return Decoder(self._tokenizer, self.token_texts, skip_special_tokens, kept_tokens)

    @property
    def tool_use(self) -> ToolUse | None:
        """What the chat template does with tools; None: there is no template."""
        return None if self._template is None else self._template.tool_use

    def reasoning(self, formats: Formats = AS_SHOWN) -> Reasoning | None:
        """How answers keep it apart. None: they do not, or there is no chat template."""
        name = formats.reasoning or self._formats.reasoning
        if name is not None:
            return REASONING_FORMATS.get(name)
        return None if self._template is None else self._template.reasoning

    def speaker(
        self,
        conversation: Conversation,
        tail: Sequence[int],
        wanted: ToolsWanted | None,
        formats: Formats = AS_SHOWN,
    ) -> Speaker:
        """How answers to a conversation are read. `tail`: the last tokens of its prompt. `formats`: as an adapter's
        manifest names them.

        Raises InvalidRequest for tools whose calls would not be told from text.
        """
        template, reasoning = self._required_template(), self.reasoning(formats)
        is_open = reasoning is not None and (
            reasoning.is_open_in(conversation.messages[-1]["content"] or "")
            if conversation.continues_last_turn
            else reasoning.is_open_behind(self.decode(tail))
        )
        if wanted is None:
            return OneSpeaker(self._spelling, reasoning, is_open)
        name = formats.calls or self._formats.calls
        format = CALL_FORMATS[name] if name else template.tool_use.format
        if format is None:
            raise InvalidRequest(
                "this model's chat template writes calls of tools in no format that is known; whoever serves it may "
                "name one, as tool_format in the adapter's manifest or with --tool-format for the base: "
                f"{', '.join(CALL_FORMATS)}",
                param="tools",
                code="unsupported_parameter",
            )
        lax = next((it.name for it in wanted.tools if it.is_strict and not format.holds_to(it)), None)
        if lax is not None:
            raise InvalidRequest(
                f"this model writes arguments without quotes ({format.name}), and cannot be held to all that the "
                f"schema of the strict tool {lax!r} says; simplify it, or send it without strict",
                param="tools",
                code="unsupported_parameter",
            )
        return OneSpeaker(self._spelling, reasoning, is_open, format, wanted, not template.tool_use.takes_several)


def _encoded(tokenizer: Tokenizer, texts: Sequence[str], param: str, add_special_tokens: bool) -> list[Encoding]:
    """In batch, which lets other threads run meanwhile."""
    try:
        return tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
    except (TypeError, UnicodeEncodeError):  # a lone surrogate
        raise InvalidRequest("the text is not valid Unicode", param=param) from None


def _ids(encoding: Encoding, max_tokens: int, param: str) -> list[int]:
    """Counted before they are built."""
    if len(encoding) > max_tokens:
        raise ContextExceeded(f"the prompt is too long: it has {len(encoding):,} tokens", max_tokens, param)
    return list(encoding.ids)


def _template_in(model_dir: Path, tokenizer_config: Mapping[str, Any]) -> Any:
    """Where multimodal models have a processor, it may keep the template, in older ones in files of its own."""
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    if tokenizer_config.get("chat_template"):
        return tokenizer_config["chat_template"]
    theirs = (_read_json(model_dir / name) for name in ("chat_template.json", "processor_config.json"))
    return next((it["chat_template"] for it in theirs if it.get("chat_template")), None)


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text()) if file.is_file() else {}


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
