"""What crosses between the front process and the engine process. Everything; nothing else does."""

import msgspec

from adapters_store.base_spec import BaseSpec
from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from server.config import EngineConfig
from server.engine.request import Fault, FinishReason, Group, LaneSpec, OfPrompt, Sampling, Tier, Token, ToldOfPrompt


class _Message(msgspec.Struct, frozen=True, tag=True):
    pass


# -- to the engine ---


class Configure(_Message, frozen=True):
    """First message: build yourself so."""

    config: EngineConfig


class AddRequest(_Message, frozen=True):
    """`group` is the id of the first request that came with the same HTTP request: they share one turn. Of two that
    wait the one of higher `priority` is served first, for a while; within one priority, adapters are served in
    proportion to their `weight`, which all requests of one name should agree on. `grammar`: what its tokens must spell,
    as server/grammars words it."""

    request_id: int
    group: Group
    lanes: list[LaneSpec]
    max_tokens: int
    sampling: Sampling
    stop_token_ids: frozenset[int]
    weight: float = 1.0
    priority: int = 0
    of_prompt: OfPrompt | None = None
    grammar: str | None = None


class Abort(_Message, frozen=True):
    request_ids: list[int]


class AddAdapter(_Message, frozen=True):
    """The adapter may be asked for from now on. Sent before its first request, and again where something has changed.

    `root` is the directory below which the package's files lie, where their paths are relative. A `pinned` adapter is
    brought to the device at once and makes no room for others.
    """

    ref: AdapterRef
    package: AdapterPackage
    root: str = ""
    pinned: bool = False


class PackedAddAdapter(_Message, frozen=True, tag="AddAdapter"):
    """AddAdapter with a package that is encoded already, and that its sender need not understand."""

    ref: AdapterRef
    package: msgspec.Raw
    root: str = ""
    pinned: bool = False


class RemoveAdapter(_Message, frozen=True):
    ref: AdapterRef


class CheckAdapter(_Message, frozen=True):
    """Compare the adapter's logits with those of the base with its weights merged, over `num_tokens` tokens."""

    check_id: int
    ref: AdapterRef
    num_tokens: int


class Shutdown(_Message, frozen=True):
    pass


ToEngine = Configure | AddRequest | Abort | AddAdapter | RemoveAdapter | CheckAdapter | Shutdown
FromFront = ToEngine | PackedAddAdapter  # as it is sent; what arrives of a PackedAddAdapter is an AddAdapter


# -- to the front ---


class Progress(_Message, frozen=True):
    """Loading: `done` of `total` steps of the stage. Also shows that the engine is alive."""

    stage: str
    done: int
    total: int


class SelfChecked(msgspec.Struct, frozen=True):
    """What the self-check found (server/model/self_check.py): tokens at positions up to `last_position` whose logits
    differ by `found` of their size, where rounding explains `allowed`."""

    num_tokens: int
    last_position: int
    found: float
    allowed: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"self-check: logits of {self.num_tokens} tokens up to position {self.last_position:,} differ from "
            f"Transformers' by {self.found:.1g} of their size, where rounding explains {self.allowed:.1g} "
            f"({self.seconds:.2f} s)"
        )


class EngineInfo(msgspec.Struct, frozen=True):
    """What the front must know of the loaded model. Sizes in tokens or bytes as named."""

    base: BaseSpec
    model_type: str  # for people: with what it is the text half of, if it is
    num_parameters: int
    device: str
    dtype: str
    max_model_len: int
    vocab_size: int
    kv_cache_tokens: int
    kv_cache_bytes: int
    adapter_bytes: int
    max_experts_per_adapter: int
    stop_token_ids: frozenset[int]
    hidden_size: int
    graph_rank: int | None = None  # LoRA adapters of a higher rank decode without captured graphs; None: there are none
    adapter_slots: int = 0  # adapters that can be on the device at once
    self_checked: SelfChecked | None = None  # None: it was not wanted, or there was no room for it


class Ready(_Message, frozen=True):
    info: EngineInfo


class StartFailed(_Message, frozen=True):
    """The engine cannot serve, and ends. `message` is for the operator; if `is_final`, starting again mends nothing."""

    message: str
    is_final: bool


class TokenEvent(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """A token of one request, its end, or both. Compact: there is one for every request in every step.

    A request that ends without a token was refused, aborted, failed, or wanted none.
    """

    request_id: int
    token: Token | None
    finish: FinishReason | None = None
    error: str | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache; set with the first event
    of_prompt: ToldOfPrompt | None = None  # with the first event, if it was asked for
    fault: Fault | None = None  # where `error` is that of its adapter, or its own
    queued_s: float = 0.0  # from its arrival at the engine until it first ran; set with the first event


class AdapterGone(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A removed adapter's last request has ended, and `num_bytes` of the device that were its own are free, or will be
    as soon as its transfer has ended."""

    ref: AdapterRef
    num_bytes: int


class AdapterChecked(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """What a CheckAdapter found: the largest difference between two logits, and the largest logit of those with merged
    weights; or why it could not be found."""

    check_id: int
    max_difference: float | None
    max_logit: float | None = None
    error: str | None = None


class AdapterMoved(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Where an adapter's weights are, told when that has changed.

    `bytes`: of the device that its pages occupy. `host_bytes`: of the host cache. `load_s`: seconds of the load that
    has just ended, if one has. `reason`: why it is quarantined, or why its load failed.
    """

    ref: AdapterRef
    tier: Tier
    bytes: int = 0
    host_bytes: int = 0
    load_s: float | None = None
    was_evicted: bool = False  # from the device, for others
    reason: str | None = None


Event = TokenEvent | AdapterGone | AdapterChecked | AdapterMoved


class Memory(msgspec.Struct, frozen=True):
    """Bytes of the device that KV blocks and adapters share: the budget, and what each holds of it now. Beside it, what
    adapters have in the host cache."""

    budget_bytes: int = 0
    kv_bytes: int = 0
    adapter_bytes: int = 0
    host_bytes: int = 0


class MaskStats(msgspec.Struct, frozen=True):
    """Of requests that a grammar constrains: masks that were made, the seconds of a processor that they took, and how
    often one was not there when its token was to be chosen."""

    made: int = 0
    seconds: float = 0.0
    late: int = 0


class Stats(msgspec.Struct, frozen=True):
    """Gauges as of now, and counters since start."""

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    steps: int = 0
    longest_step_s: float = 0.0
    computed_tokens: int = 0
    memory: Memory = Memory()
    masks: MaskStats = MaskStats()


class StepDone(_Message, frozen=True):
    """The events of one step; empty when the engine is idle and only says that it is alive."""

    events: list[Event]
    stats: Stats


ToFront = Progress | Ready | StartFailed | StepDone
