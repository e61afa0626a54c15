"""The manifest: what an operator or an author says of an adapter beside its weights. Optional, and so is every field.

It comes as `heddle.json` in the adapter's directory, or with the request that registers it. It belongs to a name, not
to the weights: the same weights may be served under two names with different manifests.
"""

from typing import Annotated, Literal

import msgspec

from adapters_store.errors import InvalidManifest

FILE = "heddle.json"
LEAST_REPETITION = 0.01  # logits are divided by it: by next to nothing, they would be beyond float32
_Text = Annotated[str, msgspec.Meta(max_length=2000)]
_Stop = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
# how a model writes calls of tools, and its reasoning, where its chat template does not show it
ToolFormat = Literal["deepseek_v3", "deepseek_v31", "functionary", "glm4", "granite", "harmony", "hermes", "internlm",
                     "kimi_k2", "lfm2", "llama3_json", "minimax_m2", "mistral", "mistral_args", "nemotron", "pythonic",
                     "qwen3_xml", "seed", "tool_calls"]  # fmt: skip
ReasoningFormat = Literal["cohere", "harmony", "mistral", "none", "seed", "think"]


class SamplingDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a request gets that does not say it itself. None: the server's own default."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, lt=2**31)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1, lt=2**31)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(ge=LEAST_REPETITION, le=10)] | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`weight` and `priority` order its requests among those that wait; `max_concurrent` bounds its sequences under
    way; a `pinned` adapter stays on the device; at `expires_at` (Unix seconds) it is deleted. `base_id` is the identity
    of the base that it must be served on (`heddle base-id`), checked strictly."""

    description: _Text = ""
    chat_template: Annotated[str, msgspec.Meta(min_length=1, max_length=65_536)] | None = None
    tool_format: ToolFormat | None = None
    reasoning_format: ReasoningFormat | None = None
    sampling: SamplingDefaults = SamplingDefaults()
    stop: Annotated[tuple[_Stop, ...], msgspec.Meta(max_length=4)] = ()
    weight: Annotated[float, msgspec.Meta(ge=0.001, le=1000)] = 1.0
    priority: Annotated[int, msgspec.Meta(ge=-100, le=100)] = 0
    max_concurrent: Annotated[int, msgspec.Meta(ge=1, lt=2**31)] | None = None
    pinned: bool = False
    expires_at: Annotated[int, msgspec.Meta(ge=0, lt=2**53)] | None = None
    base_id: Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None

    def has_expired(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now


PLAIN = Manifest()


def parse_manifest(value: object, where: str) -> Manifest:
    """`where` it stands, for the message. Raises InvalidManifest, without an echo of what was sent."""
    try:
        manifest = msgspec.convert(value, Manifest)
        msgspec.msgpack.encode(manifest)
        return manifest
    except UnicodeEncodeError:
        raise InvalidManifest(f"{where}: a text in it holds half of a surrogate pair, which has no UTF-8") from None
    except msgspec.ValidationError as error:
        raise InvalidManifest(f"{where}: {error}; docs/api.md lists the fields of a manifest") from None
