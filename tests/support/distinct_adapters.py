"""Many adapters that differ, made at the price of copies: the last weight of each is another."""

import json
import shutil
import struct
from pathlib import Path

LAST = 4  # bytes of a float32, with which a safetensors file ends


def save_distinct(root: Path, like: Path, count: int, first: int = 0, prefix: str = "d") -> list[Path]:
    """Directories `prefix`0 and on. `like` is a LoRA in float32."""
    raw = (like / "adapter_model.safetensors").read_bytes()
    made = []
    for number in range(first, first + count):
        directory = root / f"{prefix}{number}"
        directory.mkdir(parents=True)
        (directory / "adapter_model.safetensors").write_bytes(differing(raw, number))
        shutil.copyfile(like / "adapter_config.json", directory / "adapter_config.json")
        made.append(directory)
    return made


def differing(raw: bytes, number: int) -> bytes:
    return raw[:-LAST] + struct.pack("<f", (number + 1) / 1e6)


def save_small(directory: Path, linear: str, inputs: int, outputs: int) -> Path:
    """A LoRA of rank 1 on one linear, without torch."""
    keys = {f"base_model.model.{linear}.lora_A.weight": (1, inputs),
            f"base_model.model.{linear}.lora_B.weight": (outputs, 1)}  # fmt: skip
    header: dict[str, object] = {}
    raw = b""
    for key, shape in keys.items():
        values = [0.01 * (index % 7 - 3) for index in range(shape[0] * shape[1])]
        begin, raw = len(raw), raw + struct.pack(f"<{len(values)}f", *values)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(raw)]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    directory.mkdir(parents=True)
    (directory / "adapter_model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + raw)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [linear.rpartition(".")[2]],
              "layers_to_transform": None}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
