"""latent_prep: what latent attention (MLA) does between its projections and its attention, in one launch.

A token's projections give a latent, the part of its key that is rotated, and such a part of each head's query:

    cache[slot_mapping[t]]     = norm(latent[t]) | rotated(key[t])
    absorbed[t, head, -R:]     = rotated(query[t, head])

The other columns of `absorbed`, the query in the latent space, are a product's (server/model/mla.py).

Running example, one head, latents of 2 elements and 2 that are rotated, by 90 degrees; eps 0, weights of one:

    compressed [3, 4 | 1, 2]    query [5, 6]
    cache      [0.849, 1.131 | -2, 1]    absorbed [., . | -6, 5]
"""

from typing import NamedTuple

from torch import Tensor

from kernels.compiled import takes
from kernels.latent_prep import reference
from kernels.latent_prep.pairing import Pairing, Turns

__all__ = ["LatentNorm", "Pairing", "Turns", "latent_prep"]


class LatentNorm(NamedTuple):
    """As of rms_norm: weight [L], and what families' norms differ in."""

    weight: Tensor
    eps: float
    offset: float = 0.0
    cast_first: bool = True


def latent_prep(
    query: Tensor, compressed: Tensor, norm: LatentNorm, turns: Turns, cache: Tensor, slot_mapping: Tensor,
    absorbed: Tensor,
) -> None:  # fmt: skip
    """See reference.py for shapes. Writes to cache and absorbed."""
    if takes(query):
        from kernels.latent_prep.kernel import latent_prep as launch

        return launch(query, compressed, *norm, turns, cache, slot_mapping, absorbed)
    return reference.latent_prep(query, compressed, *norm, turns, cache, slot_mapping, absorbed)
