"""Every setting and every limit, by name. Frozen, validated at construction, unknown keys refused.

The engine's part crosses the process seam as a message, so both are msgspec structs.
"""

import math
import re
from pathlib import Path
from typing import Literal

import msgspec

from server.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
# forms that kernels/linear knows
LinearForm = Literal["auto", "torch", "onednn", "onednn-packed", "mkl-packed"]
Dtype = Literal["auto", "float32", "bfloat16"]
Overlap = Literal["auto", "on", "off"]
# as browsers write an origin: in lower case, without a path, and without the port that its scheme has anyway
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?P<port>:[1-9][0-9]{0,4})?")
_IMPLIED = {"http": ":80", "https": ":443"}
LEAST_ADAPTER_BYTES = 1 << 16


class EngineConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the engine process needs to build itself.

    Sizes in tokens unless the name says bytes; 0 means "derive from the machine" where the comment says so.
    """

    model_dir: str
    device: Device = "auto"
    dtype: Dtype = "auto"
    linear_form: LinearForm = "auto"  # that matrices are kept in on a CPU; auto: as is measured on this machine
    threads: int = 0  # 0: the machine's cores
    max_model_len: int = 0  # 0: the model's own limit
    block_size: int = 16
    # that KV blocks and adapters share; 0: both of the limits below, where they are set, else half of a host's free
    # memory, at most 8 GiB, or what is left of a GPU's
    memory_budget: int = 0
    kv_reserve: int = 0  # of it, that adapters never take; 0: a quarter, or one context if that is more; at most half
    kv_cache_bytes: int = 0  # the most that KV blocks take; 0: what adapters need not have
    adapter_bytes: int = 0  # the most that weights of adapters take; 0: what is not kept for KV blocks
    # of adapters' files in a host's memory, verified; 0: none; -1: beside a GPU an eighth of what is free, at most
    # 16 GiB, and none on a CPU, where the system's own cache of files is as near and costs nobody any memory
    host_cache_bytes: int = -1
    tokens_per_step: int = 0  # token budget of one step; 0: 512 on a CPU, 2048 on a GPU, at least max_running
    # of a step in which some decode and prompts are computed; 0: none; -1: 50 on a CPU, none on a GPU
    target_inter_token_ms: int = -1
    max_running: int = 128  # requests decoded together
    overlap: Overlap = "auto"  # launch a step before the tokens of the one before are known; auto: on a GPU
    max_waiting: int = 2048
    adapter_slots: int = 0  # adapters on the device at once; 0: as many as there are bytes for, up to 1,024
    max_rank: int = 64  # the highest LoRA rank that a GPU's decodes are captured for; higher ones run without
    max_experts_per_adapter: int = 0  # E_max: tuned experts of one adapter in one layer; 0: as many as the base has
    self_check: bool = True  # compare some tokens with Transformers' own before serving (server/model/self_check.py)
    trace_steps: str | None = None  # a file to which each step is appended as a line of JSON (server/model/trace.py)
    max_skips: int = 200  # steps that a request may be passed over before others stop taking room from it

    def __post_init__(self) -> None:
        _at_least(self, 0, "threads", "max_model_len", "kv_cache_bytes", "max_experts_per_adapter", "tokens_per_step")
        _at_least(self, 0, "max_rank", "memory_budget", "kv_reserve", "adapter_slots")
        _at_least(self, -1, "target_inter_token_ms", "host_cache_bytes")
        _at_least(self, 1, "block_size", "max_running", "max_waiting", "max_skips")
        if 0 != self.adapter_bytes < LEAST_ADAPTER_BYTES:
            raise ConfigError(f"adapter_bytes must be at least {LEAST_ADAPTER_BYTES}, or 0, not {self.adapter_bytes}")
        if 0 < self.tokens_per_step < self.max_running:
            raise ConfigError(
                f"tokens_per_step ({self.tokens_per_step}) must be at least max_running ({self.max_running}): "
                "every running request needs one token a step"
            )


class ServerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The front process: where it listens, what it accepts, what it serves."""

    engine: EngineConfig
    adapters_dir: str | None = None
    adapter_roots: tuple[str, ...] = ()
    model_name: str | None = None  # what requests call the base; default: the directory's name
    base_names: tuple[str, ...] = ()  # what the base is known as beside that, compared with what adapters say
    tool_format: str | None = None  # of the base's chat template, where it does not show it (docs/tools.md)
    reasoning_format: str | None = None  # likewise
    strict_base: bool = False  # refuse adapters that say they were trained on another base
    ignore_keys: tuple[str, ...] = ()  # unknown keys of configurations below adapters_dir to pass over
    store: str | None = None  # where adapters are kept; default: a directory for this base among the user's data
    max_adapters: int = 100_000  # registered at once
    allow_sources: tuple[str, ...] = ()  # what may be fetched from elsewhere, as source:pattern
    max_upload_bytes: int = 0  # of one adapter that is sent; 0: twice adapter_bytes, which float32 files of them have
    verify_timeout_s: float = 60.0  # for one adapter, every byte of which is read
    fetch_timeout_s: float = 3600.0  # for one adapter that is fetched
    verify_bound: float | None = None  # difference from merged weights that is allowed, as a part of the largest logit
    host: str = "127.0.0.1"
    port: int = 8000
    max_connections: int = 2048
    header_timeout_s: float = 10.0  # for the head of a request to arrive
    body_timeout_s: float = 30.0  # for its body to arrive
    write_timeout_s: float = 30.0  # for which a client may leave an answer unread
    max_body_bytes: int = 2 << 20
    max_n: int = 16  # completions of one prompt
    max_prompts: int = 64  # prompts in one completions request
    max_sequences: int = 128  # prompts times completions in one request
    max_request_tokens: int = 0  # of all sequences in one request; 0: KV cache, or max_n contexts if that is more
    max_messages: int = 1024  # in one conversation
    max_parts: int = 4096  # of content, in all messages of a conversation together
    max_tools: int = 128  # that one request tells of
    max_stop: int = 16
    max_stop_chars: int = 1024  # in one stop string
    max_grammar_bytes: int = 256 << 10  # of a schema, a regular expression, a list of choices or a grammar
    grammar_timeout_s: float = 1.0  # for compiling one
    max_logprobs: int = 20  # most probable tokens that are named in one place
    keep_alive_s: float = 15.0  # after which a stream in which nothing comes is sent a comment
    cors_origins: tuple[str, ...] = ()  # whose pages may ask from a browser; *: any
    max_concurrent_requests: int = 1024
    metrics_adapters: int = 50  # the most active ones, which have series of their own in /metrics
    startup_timeout_s: float = 900.0
    engine_silence_s: float = 30.0  # after so long without a word from the engine new work is refused
    engine_silence_exit_s: float = 300.0  # and after so long the server exits; 0: never
    engine_death_grace_s: float = 2.0  # time in which the dead engine is reported before the server exits
    drain_s: float = 5.0  # time in which running requests may finish after Ctrl-C or SIGTERM

    def __post_init__(self) -> None:
        _at_least(self, 0, "max_request_tokens", "engine_silence_exit_s", "drain_s", "max_upload_bytes",
                  "metrics_adapters")  # fmt: skip
        _at_least(self, 1, "max_adapters", "max_body_bytes", "max_n", "max_prompts", "max_sequences", "max_messages",
                  "max_parts", "max_tools", "max_stop", "max_stop_chars", "max_concurrent_requests", "max_connections",
                  "max_logprobs", "max_grammar_bytes")  # fmt: skip
        if self.verify_bound is not None and not 0 <= self.verify_bound < math.inf:
            raise ConfigError(f"verify_bound must be at least 0, not {self.verify_bound:g}")
        for name in (
            "fetch_timeout_s",
            "grammar_timeout_s",
            "header_timeout_s",
            "body_timeout_s",
            "write_timeout_s",
            "engine_silence_s",
            "startup_timeout_s",
            "keep_alive_s",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be more than 0 seconds, not {getattr(self, name)}")
        if not 0 < self.verify_timeout_s < 86400:
            raise ConfigError(f"verify_timeout_s must be above 0 and below 86400, not {self.verify_timeout_s:g}")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port {self.port} is not between 0 and 65535")
        if not Path(self.engine.model_dir).is_dir():
            raise ConfigError(f"the model directory {self.engine.model_dir!r} does not exist")
        if self.adapters_dir is not None and not Path(self.adapters_dir).is_dir():
            raise ConfigError(f"the adapter directory {self.adapters_dir!r} does not exist")
        for root in self.adapter_roots:
            if not Path(root).is_dir():
                raise ConfigError(f"the adapter root {root!r} does not exist")
        _check_origins(self.cors_origins)

    @property
    def base_name(self) -> str:
        return self.model_name or Path(self.engine.model_dir).resolve().name

    @property
    def roots(self) -> tuple[Path, ...]:
        """Directories below which adapters may be read, the one given with --adapters first."""
        listed = ((self.adapters_dir,) if self.adapters_dir else ()) + self.adapter_roots
        return tuple(Path(root) for root in listed)


def _check_origins(origins: tuple[str, ...]) -> None:
    """One that no browser sends would open nothing, and its author would think that it did."""
    if "*" in origins and len(origins) > 1:
        raise ConfigError("cors_origins has * beside others; * stands for all of them")
    for origin in origins:
        match = _ORIGIN.fullmatch(origin)
        if origin != "*" and (match is None or match["port"] == _IMPLIED.get(origin.partition(":")[0], "")):
            raise ConfigError(
                f"the origin {origin!r} is none that a browser sends; write scheme://host or scheme://host:port in "
                "lower case, without a path and without the scheme's own port, or *"
            )


def _at_least(config: msgspec.Struct, minimum: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < minimum:
            raise ConfigError(f"{name} must be at least {minimum}, not {getattr(config, name)}")
