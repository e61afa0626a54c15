"""Which kind of memory and of copy a device gets. Everything else is written once for all devices."""

import torch

from server.weights.arena import Arenas, VirtualMemoryUnsupported, log
from server.weights.cuda_arena import cuda_arenas
from server.weights.host_arena import host_arenas
from server.weights.padded_arena import PaddedArenas
from server.weights.staging import Copier, HostCopy, pinned_copy


def choose_arenas(device: torch.device) -> Arenas:
    """Pages that come and go, or where the device cannot do that, everything up front. Raises ArenaError."""
    if device.type == "cpu":
        return host_arenas()
    try:
        return cuda_arenas(device)
    except VirtualMemoryUnsupported as error:
        log.warning(
            "%s is used without virtual memory (%s). With a mixture of experts every adapter slot then takes room "
            "for max_experts_per_adapter experts of every layer from adapter_bytes, used or not",
            device,
            error,
        )
        return PaddedArenas(device)


def choose_copier(device: torch.device) -> Copier:
    return HostCopy() if device.type == "cpu" else pinned_copy(device)
