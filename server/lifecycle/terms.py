"""What a server demands of adapters beside that they fit, and what it gives them at most."""

import msgspec


class Terms(msgspec.Struct, frozen=True):
    base_names: tuple[str, ...]  # what the base is known as
    strict_base: bool  # refuse adapters that say they were trained on another
    parity_bound: float  # largest difference of a logit that `verify` allows, as a part of the largest logit
    most_pinned_bytes: int  # of all pinned adapters together
    most_pinned: int
    graph_rank: int | None  # LoRA adapters of a higher rank decode without captured graphs; None: there are none
