"""Bytes and operations of the two models, from their sizes. bfloat16 throughout."""

from dataclasses import dataclass
from typing import NamedTuple

BYTES = 2  # of a number


class Site(NamedTuple):
    """A product that LoRA acts on: depth, and the width of each linear that is computed together there."""

    depth: int
    widths: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.depth * sum(self.widths) * BYTES


class Llama(NamedTuple):
    """Llama-3.1-8B."""

    layers: int = 32
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    key_heads: int = 8
    head: int = 128
    vocab: int = 128256

    @property
    def sites(self) -> tuple[Site, ...]:
        width = self.key_heads * self.head
        qkv, gate_up = (self.heads * self.head, width, width), (self.inner, self.inner)
        return (Site(self.hidden, qkv), Site(self.heads * self.head, (self.hidden,)), Site(self.hidden, gate_up),
                Site(self.inner, (self.hidden,)))  # fmt: skip

    @property
    def kv_bytes(self) -> int:
        """Of one token in one layer."""
        return 2 * self.key_heads * self.head * BYTES

    @property
    def head_bytes(self) -> int:
        return self.vocab * self.hidden * BYTES


@dataclass(frozen=True)
class V2Lite:
    """DeepSeek-V2-Lite: the first layer's MLP is dense. shared: of experts' width, chosen always."""

    layers: int = 26  # with experts, and one without
    hidden: int = 2048
    inner: int = 1408
    dense_inner: int = 10944
    experts: int = 64
    choices: int = 6
    shared: int = 2
    heads: int = 16
    nope: int = 128
    rope: int = 64
    latent: int = 512
    value: int = 128
    vocab: int = 102400

    @property
    def query_and_latent(self) -> int:
        """Numbers of the product that gives queries and the latent."""
        return (self.heads * (self.nope + self.rope) + self.latent + self.rope) * self.hidden

    @property
    def out(self) -> int:
        return self.heads * self.value * self.hidden

    @property
    def absorbed(self) -> int:
        """Of each of the two products by head that go around keys and values."""
        return self.heads * self.nope * self.latent

    @property
    def attention_numbers(self) -> int:
        return self.query_and_latent + self.out + 2 * self.absorbed

    @property
    def expert(self) -> int:
        return 3 * self.hidden * self.inner

    @property
    def kv_bytes(self) -> int:
        return (self.latent + self.rope) * BYTES

    @property
    def head_bytes(self) -> int:
        return self.vocab * self.hidden * BYTES
