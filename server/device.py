"""Where a model is computed, and how the memory there is shared out."""

import torch

from server.config import Device, Dtype, EngineConfig
from server.errors import ConfigError
from server.memory import available_bytes

CPU = torch.device("cpu")

DEFAULT_HOST_KV_BYTES = 4 << 30
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


def require_room(device: torch.device, weight_bytes: int, adapter_bytes: int) -> None:
    """Raise ConfigError where weights and adapters cannot fit, before anything is moved."""
    if device.type == "cpu":
        return
    free, total = torch.cuda.mem_get_info(device)
    # a model that was made on the device is part of what is taken already
    free += torch.cuda.memory_allocated(device)
    if weight_bytes + adapter_bytes + reserved_bytes(total) > free:
        raise ConfigError(
            f"the model's weights take {weight_bytes:,} bytes, adapters {adapter_bytes:,} (adapter_bytes), and "
            f"{reserved_bytes(total):,} are kept for activations; {device} has {free:,} of {total:,} free"
        )


def reserved_bytes(total: int) -> int:
    """Of a GPU's memory, for what is neither weights nor adapters nor KV cache."""
    return _CONTEXT_BYTES + int(total * _RESERVED_SHARE)


def choose_tokens_per_step(config: EngineConfig, device: torch.device) -> int:
    """As configured, else so many that a GPU is busy with its steps rather than with their launches."""
    return config.tokens_per_step or max(config.max_running, DEFAULT_TOKENS_PER_STEP[device.type])


def choose_target_s(config: EngineConfig, device: torch.device) -> float:
    """As configured, else a calm one on a CPU; none on a GPU, where what it costs was not measured."""
    wanted = config.target_inter_token_ms
    return (DEFAULT_TARGET_MS[device.type] if wanted < 0 else wanted) / 1000


def num_kv_blocks(
    config: EngineConfig, max_model_len: int, bytes_per_block: int, device: torch.device, adapter_bytes: int
) -> int:
    """Blocks of KV cache: as configured, else what is free once the weights are in place and adapters have theirs.

    adapter_bytes: what adapters may still take. Raises ConfigError with the numbers.
    """
    if device.type == "cpu":
        budget = config.kv_cache_bytes or min(DEFAULT_HOST_KV_BYTES, available_bytes() // 4)
    else:
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = kv_bytes(config.kv_cache_bytes, free + unused, total, adapter_bytes)
    blocks = budget // bytes_per_block
    if blocks <= 0:
        raise ConfigError(
            f"there are {max(0, budget):,} bytes for the KV cache, less than one block ({bytes_per_block:,} bytes)"
            f"{'' if config.kv_cache_bytes else f'; adapters have {adapter_bytes:,} (adapter_bytes)'}"
        )
    # at most what all running requests can hold at once: prefixes of earlier ones live in what those leave free
    return min(blocks, config.max_running * -(-max_model_len // config.block_size))


def kv_bytes(wanted: int, free: int, total: int, adapter_bytes: int) -> int:
    """Of a GPU's memory, for the KV cache. wanted: 0 is all that is left. Raises ConfigError if that is less."""
    left = free - adapter_bytes - reserved_bytes(total)
    if wanted and wanted > left:
        raise ConfigError(
            f"kv_cache_bytes {wanted:,} does not fit: {free:,} bytes of the GPU's {total:,} are free, of which "
            f"adapters may take {adapter_bytes:,} (adapter_bytes); {reserved_bytes(total):,} are kept for activations"
        )
    return wanted or left


def keep_free(device: torch.device, adapter_bytes: int) -> None:
    """Bar torch from the adapters' share of a GPU: their pages come from the driver, past torch, and much later."""
    if device.type == "cpu":
        return
    free, total = torch.cuda.mem_get_info(device)
    limit = torch.cuda.memory_reserved(device) + free - adapter_bytes
    torch.cuda.set_per_process_memory_fraction(max(0.01, limit / total), device)
