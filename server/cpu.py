"""Which CPU this is, and which of its instructions matter to products."""

from pathlib import Path
from typing import NamedTuple

_INFO = Path("/proc/cpuinfo")
# as Linux spells them, of x86 and of Arm
_TELLING = (
    "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve", "bf16", "i8mm",
)  # fmt: skip


class Cpu(NamedTuple):
    model: str
    flags: tuple[str, ...]  # those that matter, in a fixed order

    @property
    def multiplies_bfloat16(self) -> bool:
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(self.flags))


def this_cpu() -> Cpu:
    """Empty where Linux does not say."""
    lines = _INFO.read_text().splitlines() if _INFO.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    # clouds hide names: family, model and stepping tell CPUs of one maker apart
    number = "/".join(fields[key] for key in ("cpu family", "model", "stepping") if key in fields)
    name = fields.get("model name", fields.get("CPU implementer", ""))
    return Cpu(f"{name} ({number})" if number else name, tuple(flag for flag in _TELLING if flag in flags))
