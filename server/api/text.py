"""Text to tokens and back, without torch or Transformers: the tokenizer's own file, and the model's chat template."""

import copy
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from tokenizers import Encoding, Tokenizer
from tokenizers.decoders import DecodeStream

from adapters_store.errors import InvalidManifest
from server.api.control_tokens import ControlTokens, Twin
from server.api.template_sandbox import Sandbox
from server.errors import ConfigError, InvalidRequest


class Text:
    """The tokenizer and chat template of the base model, or an adapter's template with the same tokenizer."""

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None, special_tokens: Mapping[str, str]) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        self._sandbox, self._twin = Sandbox(), Twin(tokenizer)
        self._template: Template | None = None
        self._control_tokens: ControlTokens | None = None
        if chat_template:
            self._take(chat_template)

    def with_template(self, template: str) -> "Text":
        """The same with an adapter's chat template. Raises InvalidManifest for one that does not compile, and for one
        that fails on a plain message of a user.

        Takes milliseconds, and on a base without a template, the first time, as long as its tokenizer does to load.
        """
        text = copy.copy(self)
        try:
            text._template = self._sandbox.compiled(template)
        except Exception as error:  # a deep one is too much for Python's compiler, in several ways
            reason = str(error) if isinstance(error, TemplateError) else type(error).__name__
            raise InvalidManifest(f"the adapter's chat template is broken: {reason}; correct it") from None
        try:
            text.render_chat([{"role": "user", "content": "Hello."}])
            text._control_tokens = ControlTokens(self._twin, template, text._rehearse())
        except InvalidRequest as error:
            reason = error.message
        except (TypeError, UnicodeEncodeError):  # a lone surrogate
            reason = "what it makes is not valid Unicode"
        else:
            return text
        raise InvalidManifest(f"the adapter's chat template fails on a plain message of a user: {reason}; correct it")

    def _take(self, template: str) -> None:
        self._template = self._sandbox.compiled(template)
        self._control_tokens = ControlTokens(self._twin, template, self._rehearse())

    @classmethod
    def load(cls, model_dir: Path) -> "Text":
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
            config_file = model_dir / "tokenizer_config.json"
            config = json.loads(config_file.read_text()) if config_file.is_file() else {}
            template_file = model_dir / "chat_template.jinja"
            template = template_file.read_text() if template_file.is_file() else config.get("chat_template")
            if isinstance(template, list):  # several named ones
                template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
            tokens = ("bos_token", "eos_token", "pad_token")
            special = {name: _content(config[name]) for name in tokens if config.get(name)}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"tokenizer_config.json or chat_template.jinja of {model_dir.name!r} cannot be read: {error!r}"
            ) from None
        try:
            return cls(tokenizer, template, special)
        except (TemplateError, RecursionError, SyntaxError) as error:
            raise ConfigError(f"the chat template of {model_dir.name!r} is broken: {error}") from None

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, texts: Sequence[str], max_tokens: int, param: str) -> list[list[int]]:
        """Token ids of each text. `param` is the request's field that they came in.

        Raises InvalidRequest for a text of more than `max_tokens`; one that cannot be so few costs nothing.
        """
        for text in texts:
            self._refuse_if_longer(len(text), max_tokens, param)
        return [_ids(it, max_tokens, param) for it in _encoded(self._tokenizer, texts, param, add_special_tokens=True)]

    def most_chars(self, num_tokens: int) -> int:
        """Characters that so many tokens can stand for."""
        return num_tokens * self._longest_token

    def _refuse_if_longer(self, num_chars: int, max_tokens: int, param: str) -> None:
        if num_chars > self.most_chars(max_tokens):
            raise InvalidRequest(
                f"the text has {num_chars:,} characters; the model's {max_tokens:,} tokens are at most "
                f"{self.most_chars(max_tokens):,}",
                param=param,
                code="context_length_exceeded",
            )

    def encode_chat(self, messages: Sequence[Mapping[str, str]], max_tokens: int) -> list[int]:
        """Token ids of a conversation. What messages say is text, even where it spells a control token; an assistant's
        earlier turn is the exception, since the model may have generated it."""
        if self._control_tokens is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        self._refuse_if_longer(sum(len(it["content"]) for it in messages), max_tokens, "messages")
        hide, said = self._control_tokens.hide, [it["content"] for it in messages if it["role"] != "assistant"]
        hidden = [it if it["role"] == "assistant" else {**it, "content": hide(it["content"])} for it in messages]
        tokenizer, text = self._tokenizer, self.render_chat(hidden)
        try:
            if self._control_tokens.may_be_spelled(said):
                tokenizer, text = self._control_tokens.seal(text)
        except (TypeError, UnicodeEncodeError):  # a lone surrogate, for a normalizer
            raise InvalidRequest("the text is not valid Unicode", param="messages") from None
        return _ids(_encoded(tokenizer, [text], "messages", add_special_tokens=False)[0], max_tokens, "messages")

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The messages as the model was trained to read them, special tokens and all, ready for its answer."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
        try:
            variables = dict(messages=messages, add_generation_prompt=True, tools=None, **self._special_tokens)
            return self._sandbox.rendered(self._template, variables)
        except TemplateError as error:  # by the template itself, for roles it does not take
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from None
        except Exception as error:  # a template is a program, and not ours
            raise InvalidRequest(
                f"the chat template fails on these messages ({type(error).__name__})", param="messages"
            ) from None

    def _rehearse(self) -> list[str]:
        """What the template makes of conversations of every role that it takes."""
        rehearsed: list[str] = []
        for roles in (("user", "assistant", "user"), ("system", "user"), ("user", "assistant", "tool")):
            with suppress(InvalidRequest):
                rehearsed.append(self.render_chat([{"role": role, "content": "Hello."} for role in roles]))
        return rehearsed

    def decoder(self) -> "Decoder":
        return Decoder(self._tokenizer)


class Decoder:
    """Text of one answer, token by token; a character of several tokens comes out when it is whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        return self._stream.step(self._tokenizer, token) or ""


class StopMatcher:
    """Cuts text at the stop string that is complete first, however the text arrives in pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""  # the end of the text, which may be the beginning of a stop
        self.matched = False

    def push(self, text: str) -> str:
        """Text that is safe to send. Once `matched`, what follows the stop (and the stop) is gone."""
        if not self._stops:
            return text
        self._held += text
        found = [(place + len(stop), place) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.matched = True
            return self._release(min(found)[1])
        longest = max(self._overlap(stop) for stop in self._stops)
        return self._release(len(self._held) - longest)

    def flush(self) -> str:
        """No more text comes: what was held back is no stop."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        return released

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(stop[:size])), 0)


def _encoded(tokenizer: Tokenizer, texts: Sequence[str], param: str, add_special_tokens: bool) -> list[Encoding]:
    """In batch, which lets other threads run meanwhile."""
    try:
        return tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
    except (TypeError, UnicodeEncodeError):  # a lone surrogate
        raise InvalidRequest("the text is not valid Unicode", param=param) from None


def _ids(encoding: Encoding, max_tokens: int, param: str) -> list[int]:
    """Counted before they are built."""
    if len(encoding) > max_tokens:
        raise InvalidRequest(
            f"the text has {len(encoding):,} tokens; the model's context has {max_tokens:,}",
            param=param,
            code="context_length_exceeded",
        )
    return list(encoding.ids)


def _content(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
