"""Where a model is computed, and how the memory there is shared out."""

import torch

from server.config import LEAST_ADAPTER_BYTES, Device, Dtype, EngineConfig
from server.errors import ConfigError
from server.memory import available_bytes

CPU = torch.device("cpu")

DEFAULT_HOST_BYTES = 8 << 30
DEFAULT_CACHE_BYTES = 16 << 30
DEFAULT_PADDED_SLOTS = 8
_MOST_SLOTS, _MOST_ADDRESSES, _ALL_ADDRESSES = 1024, 16 << 40, 64 << 40
DEFAULT_TOKENS_PER_STEP = {"cpu": 512, "cuda": 2048}
DEFAULT_TARGET_MS = {"cpu": 50, "cuda": 0}
# what a GPU keeps beside weights, adapters and KV cache: its context, captured graphs, a step's activations
_RESERVED_SHARE = 0.05
_CONTEXT_BYTES = 1 << 30


def choose_device(wanted: Device) -> torch.device:
    """The GPU if there is one, unless the configuration says otherwise. Raises ConfigError."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device 'cuda' was asked for and torch {torch.__version__} sees no GPU; use cpu or auto")
    if wanted == "cpu" or not torch.cuda.is_available():
        return CPU
    if torch.version.hip:
        raise ConfigError("AMD GPUs are not served: kernels compile for them and have not been run; use cpu")
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(wanted: Dtype, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU, where nothing else is asked for."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def bytes_left(device: torch.device, weight_bytes: int) -> int:
    """For KV blocks and adapters: beside the model's weights, of which so many bytes are not on the device yet. Raises
    ConfigError where nothing is left. A host's is a default, not a bound: half of what is free, at most 8 GiB."""
    if device.type == "cpu":
        return min(DEFAULT_HOST_BYTES, available_bytes() // 2)
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    left = free - weight_bytes - reserved_bytes(total)
    if left <= 0:
        raise ConfigError(
            f"the model's weights take {weight_bytes:,} bytes more, and {reserved_bytes(total):,} are kept for "
            f"activations; {device} has {free:,} of {total:,} free"
        )
    return left


def reserved_bytes(total: int) -> int:
    """Of a GPU's memory, for what is neither weights nor adapters nor KV cache."""
    return _CONTEXT_BYTES + int(total * _RESERVED_SHARE)


def choose_tokens_per_step(config: EngineConfig, device: torch.device) -> int:
    """As configured, else so many that a GPU is busy with its steps rather than with their launches."""
    return config.tokens_per_step or max(config.max_running, DEFAULT_TOKENS_PER_STEP[device.type])


def choose_target_s(config: EngineConfig, device: torch.device) -> float:
    """As configured, else a calm one on a CPU; none on a GPU, where what it costs was not measured, nor on a CPU where
    steps overlap: there a step is over when it is launched, and its time would be taken for that of the one before."""
    wanted = config.target_inter_token_ms
    if device.type == "cpu" and chooses_overlap(config, device):
        return 0.0
    return (DEFAULT_TARGET_MS[device.type] if wanted < 0 else wanted) / 1000


def chooses_overlap(config: EngineConfig, device: torch.device) -> bool:
    """As configured, else on a GPU: on a CPU whoever plans the next step takes the time from this one."""
    return config.overlap == "on" or (config.overlap == "auto" and device.type == "cuda")


def host_cache_bytes(config: EngineConfig, device: torch.device) -> int:
    """As configured, else an eighth of what is free. None where the device is the host: the system caches files there,
    and hashing them again is all that would be saved."""
    if config.host_cache_bytes > available_bytes():
        raise ConfigError(
            f"host_cache_bytes {config.host_cache_bytes:,} is more than is free: {available_bytes():,} bytes of memory"
        )
    if config.host_cache_bytes >= 0:
        return config.host_cache_bytes
    return 0 if device.type == "cpu" else min(DEFAULT_CACHE_BYTES, available_bytes() // 8)


def choose_slots(config: EngineConfig, adapter_bytes: int, weight_bytes: int, is_shared: bool) -> int:
    """Places for adapters: as configured, else so many that bytes are what adapters lack first. A slot costs addresses,
    for all that adapters may take and for a set of experts, and some kilobytes of tables."""
    if config.adapter_slots:
        addresses = config.adapter_slots * max(adapter_bytes, weight_bytes)
        if is_shared and addresses > _ALL_ADDRESSES:
            raise ConfigError(
                f"adapter_slots {config.adapter_slots:,} take {addresses / 2**40:,.0f} TiB of addresses; a process has "
                f"{_ALL_ADDRESSES >> 40} for them. Lower it, or set it to 0 for as many as bytes allow"
            )
        return config.adapter_slots
    if not is_shared:
        return DEFAULT_PADDED_SLOTS
    addresses = _MOST_ADDRESSES // max(adapter_bytes, weight_bytes)
    return max(1, min(_MOST_SLOTS, adapter_bytes // LEAST_ADAPTER_BYTES, addresses))


def keep_free(device: torch.device, num_bytes: int) -> None:
    """Bar torch from so much of a GPU: pages of adapters and KV blocks come from the driver, past torch, and later."""
    if device.type == "cpu":
        return
    free, total = torch.cuda.mem_get_info(device)
    limit = torch.cuda.memory_reserved(device) + free - num_bytes
    torch.cuda.set_per_process_memory_fraction(max(0.01, limit / total), device)
