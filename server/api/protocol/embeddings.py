"""The body of POST /v1/embeddings."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from server.api.protocol.body import Count, Finite, Label, Labels, Unserved
from server.api.protocol.completions import Prompts
from server.api.protocol.generation import Model
from server.api.protocol.schema import limit
from server.engine.request import Pooling


class EmbeddingBody(Labels):
    """`pooling`: the mean over the last hidden states of all tokens, or the last token's. `normalize`: to length 1, as
    OpenAI's are. `dimensions`: what the vectors have anyway. The rest is as in a completion."""

    UNSERVED: ClassVar[Unserved] = {
        "truncate_prompt_tokens": (), "embed_dtype": ("float32",), "endianness": ("little",), "messages": (),
    }  # fmt: skip

    model: Model
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[
        Count | None, Field(json_schema_extra={"minimum": limit("hidden_size"), "maximum": limit("hidden_size")})
    ] = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: Label | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    timeout: Annotated[Finite, Field(gt=0, le=86_400)] | None = None
