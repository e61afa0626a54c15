"""Converts a model and its adapters to GGUF, float32, by llama.cpp's own scripts: SOURCES DIRECTORY [ADAPTER ...]

The benchmarks' tokenizer is none that those scripts know, so the vocabulary is written here: token i is spelled "<i>".
"""
# /// script
# dependencies = ["gguf", "torch==2.13.0", "transformers==5.23.0", "sentencepiece"]
# ///

import json
import subprocess
import sys
from pathlib import Path


def convert_base(sources: Path, base: Path, target: Path) -> None:
    import convert_hf_to_gguf as convert
    import gguf
    from conversion.llama import LlamaModel

    size = json.loads((base / "config.json").read_text())["vocab_size"]

    def set_vocab(self):
        self.gguf_writer.add_tokenizer_model("gpt2")
        self.gguf_writer.add_tokenizer_pre("default")
        self.gguf_writer.add_token_list([f"<{index}>" for index in range(size)])
        self.gguf_writer.add_token_types([int(gguf.TokenType.NORMAL)] * size)
        self.gguf_writer.add_token_merges(["a b"])  # an empty list is refused

    LlamaModel.set_vocab = set_vocab
    sys.argv = ["convert", str(base), "--outtype", "f32", "--outfile", str(target)]
    convert.main()


def main() -> None:
    sources, directory, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    if not (directory / "base.gguf").exists():
        convert_base(sources, directory / "base", directory / "base.gguf")
    (directory / "adapters-gguf").mkdir(exist_ok=True)
    for name in names:
        subprocess.run([sys.executable, str(sources / "convert_lora_to_gguf.py"), str(directory / "adapters" / name),
                        "--base", str(directory / "base"), "--outtype", "f32", "--outfile",
                        str(directory / "adapters-gguf" / f"{name}.gguf")], check=True)  # fmt: skip


if __name__ == "__main__":
    main()
