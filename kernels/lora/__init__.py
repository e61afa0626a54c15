"""lora: add each segment's own low-rank product to the output of a linear."""

from kernels.lora.reference import LoraWeights, Segment, lora

__all__ = ["LoraWeights", "Segment", "lora"]
