"""store_kv: write the keys and values of a step's tokens to their places in the paged cache."""

from kernels.store_kv.reference import store_kv

__all__ = ["store_kv"]
