"""One request as the engine sees it."""

import enum

import msgspec

from adapters_store.ref import AdapterRef

Group = int  # the requests of one HTTP request, by the id of its first


class Sampling(msgspec.Struct, frozen=True):
    """How to choose the next token. temperature 0 is greedy; top_k 0 and top_p 1 are off.

    The n-th token of a request depends on `seed`, n and the logits alone, not on what else was in the batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Request:
    """A sequence of tokens and how far the model has come with it.

    There is no prefill state and no decode state: `num_computed_tokens` chases `len(tokens)`, and a token is sampled
    whenever it catches up.

        tokens        [ prompt ............ | generated ... ]
        in KV cache   [ num_computed_tokens ......... |     ]     <- blocks in block_table
    """

    def __init__(
        self,
        request_id: int,
        prompt: list[int],
        max_tokens: int,
        sampling: Sampling,
        adapter: AdapterRef | None = None,
        stop_token_ids: frozenset[int] = frozenset(),
        group: Group | None = None,
    ) -> None:
        """`group` None: the request is alone in its own."""
        assert prompt and max_tokens > 0
        self.id = request_id
        self.group = request_id if group is None else group
        self.tokens = list(prompt)
        self.prompt_len = len(prompt)
        self.max_tokens = max_tokens
        self.sampling = sampling
        self.adapter = adapter
        self.stop_token_ids = stop_token_ids
        self.status = Status.WAITING
        self.num_computed_tokens = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # of the leading full blocks, as far as they were needed
        self.num_committed_blocks = 0  # leading blocks whose content the prefix cache knows
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache when first admitted
        self.was_admitted = False  # has run before, if only to be preempted
        self.slot = 0  # adapter slot while running; 0 is the base
        self.num_skips = 0  # times passed over for want of adapter room
        self.num_passes = 0  # times that others were let pass while it waited for KV blocks

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.tokens) - self.num_computed_tokens

    @property
    def max_len(self) -> int:
        """Tokens of KV cache that this request can come to need: the last sampled token is never computed."""
        return self.prompt_len + self.max_tokens - 1

    def finish_reason_after(self, token: int) -> FinishReason | None:
        """Called when `token` was just appended."""
        if token in self.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_generated >= self.max_tokens else None
