"""expert_route: send each token's chosen experts through its adapter's expert map, and bucket the result."""

from kernels.expert_route.reference import Buckets, expert_route

__all__ = ["Buckets", "expert_route"]
