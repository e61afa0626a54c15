"""Which tokens a model has: what both processes of this room are told first."""

import msgspec


class VocabularySpec(msgspec.Struct, frozen=True, tag=True):
    """`vocab_size`: of the model, whose tokenizer may know fewer tokens, or more."""

    model_dir: str
    vocab_size: int
    stop_token_ids: tuple[int, ...]
