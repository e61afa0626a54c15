"""Sparse attention whose indexer chooses what a token attends to (DeepSeek-V3.2, GLM-5), as long as it chooses all.

The indexer scores every earlier token and keeps the index_topk best. Up to that length of the context everything is
kept, whatever the scores are: then this is attention over latents as DeepSeek-V3 has it, and the indexer is not asked.
No adapter of an indexer can change that either. Longer sequences are refused (families.max_model_len).
"""

from server.model.families import Foreign

_EVERYTHING = ()  # what an indexer chose; layers hand it on to each other


class _NoMask:
    """The mask of a layer, for a forward that looks into it on behalf of its indexer."""

    def __getitem__(self, _: object) -> None:
        return None


class Unindexed:
    """Takes the place of the forward of an attention module that would ask its indexer."""

    def __init__(self, attention: Foreign) -> None:
        self.inner, self._mask = attention.forward, _NoMask()

    def __call__(self, *, attention_mask: None, **arguments: object) -> object:
        return self.inner(attention_mask=self._mask, **arguments)


def skip_indexer(attention: Foreign) -> None:
    """If it has one, or takes over what another layer's has chosen."""
    if not hasattr(attention, "indexer"):
        return
    if attention.indexer is not None:
        attention.indexer.forward = lambda *_, **__: _EVERYTHING
    attention.forward = Unindexed(attention)
