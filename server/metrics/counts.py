"""What is counted of one model: of the base, of an adapter, or of all adapters that have no series of their own."""

from collections import Counter

from server.metrics.histogram import INTER_TOKEN_SECONDS, SECONDS, Histogram


class Counts:
    __slots__ = (
        "cached_tokens", "duration", "evictions", "generated_tokens", "inter_token", "loads", "looked_up_tokens",
        "prompt_tokens", "queued", "requests", "time_to_first_token",
    )  # fmt: skip

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()  # by how they ended
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.looked_up_tokens = 0  # prompt tokens that were looked for in the prefix cache
        self.cached_tokens = 0  # and found there
        self.evictions = 0
        self.time_to_first_token = Histogram(SECONDS)
        self.inter_token = Histogram(INTER_TOKEN_SECONDS)
        self.queued = Histogram(SECONDS)
        self.duration = Histogram(SECONDS)
        self.loads = Histogram(SECONDS)

    def add(self, other: "Counts") -> None:
        """What was counted there too."""
        self.requests.update(other.requests)
        self.prompt_tokens += other.prompt_tokens
        self.generated_tokens += other.generated_tokens
        self.looked_up_tokens += other.looked_up_tokens
        self.cached_tokens += other.cached_tokens
        self.evictions += other.evictions
        self.time_to_first_token.add(other.time_to_first_token)
        self.inter_token.add(other.inter_token)
        self.queued.add(other.queued)
        self.duration.add(other.duration)
        self.loads.add(other.loads)
