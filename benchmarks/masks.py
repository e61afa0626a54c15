"""What making a mask takes: `python -m benchmarks.masks` answers random texts that follow some grammars.

Each is measured where it is made, in the process beside the engine, with the demo's vocabulary and with one of 150,000
byte strings that are like those of large models. `round trip` is what the engine would see: from the token to the mask.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from server.engine.masks import Mask
from server.grammars import mask_maker
from server.grammars.compose import composed
from server.grammars.gbnf import in_lark
from server.grammars.mask_maker import MaskMaker
from server.grammars.mask_messages import Masked
from server.grammars.source import GrammarSource, Kind

DEMO = Path(__file__).resolve().parents[1] / "demo" / "base"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"enum": ["new", "known", "lost"]}, "maxItems": 5},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string"},
                "city": {"type": "string"},
                "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["street", "city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "address"],
    "additionalProperties": False,
}  # fmt: skip
GRAMMARS: dict[str, tuple[Kind, str]] = {
    "JSON Schema": ("json_schema", json.dumps(PERSON)),
    "any JSON": ("json_schema", '{"type": "object"}'),
    "regular expression": ("regex", r"[A-Z][a-z]+( [A-Z][a-z]+){1,3}, \+?[0-9][0-9 -]{6,14}"),
    "GBNF": ("ebnf", 'root ::= term ([-+*/] term)*\nterm ::= [0-9]+ | "(" root ")" | "f(" root ("," root)* ")"'),
}
SYLLABLES = "ka te ri mo lu shi ne ra vo xi pa du an er in on st th qu zz ei ou ing ed tion".split()
MARKS = [
    '"',
    '":',
    '": "',
    '","',
    '", "',
    "{",
    '{"',
    "}",
    "},",
    "[",
    "]",
    "],",
    ":",
    ",",
    "\n",
    "\n  ",
    "  ",
    "();",
    "->",
]


def large_vocabulary(folder: Path, size: int) -> Path:
    """Words, with and without a space before them, numbers, and what is frequent in JSON and programs."""
    rng, names = random.Random(0), dict.fromkeys(["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    texts = [*MARKS, *map(str, range(1000)), *(" " * count for count in range(2, 30))]
    names |= dict.fromkeys(spelled.pre_tokenize_str(text)[0][0] for text in texts)
    while len(names) < size:
        word = "".join(rng.choices(SYLLABLES, k=rng.randint(1, 5)))
        word = word.capitalize() if rng.random() < 0.2 else word
        names[f"Ġ{word}" if rng.random() < 0.5 else word] = None
    tokenizer = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = spelled, decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


class Watched(MaskMaker):
    """Keeps what each mask took."""

    def __init__(self, model_dir: Path, vocab_size: int, stop: int) -> None:
        super().__init__(model_dir, vocab_size, (stop,), max_requests=1)
        self.seconds: list[float] = []

    def _take(self, message: mask_maker.FromMasks) -> None:
        if isinstance(message, Masked):
            self.seconds.append(message.seconds)
        super()._take(message)


def choose(mask: Mask, stop: int, rng: random.Random) -> int | None:
    """One of the allowed tokens, or None at an end."""
    bits = int.from_bytes(mask, "little") & ~(1 << stop)
    if not bits:
        return None
    place = rng.randrange(bits.bit_length())
    above = bits >> place
    return place + (above & -above).bit_length() - 1 if above else (bits & -bits).bit_length() - 1


def measure(masks: Watched, grammar: str, stop: int, num_tokens: int) -> tuple[list[float], list[float]]:
    """Seconds of each mask, and of each round trip; the first of each answer not counted."""
    rng, made, trips, request = random.Random(1), list[float](), list[float](), 0
    while len(made) < num_tokens:
        request += 1
        masks.open(request, grammar, ())
        begin, count = None, 0
        while True:
            if not masks.is_ready(request):
                broken = masks.poll()
                if broken:
                    raise SystemExit(broken[0].reason)
                masks.collect([request], lambda: False, may_wait=True)
                continue
            mask = masks.collect([request], lambda: False, may_wait=False)[request]
            if begin is not None:
                trips.append(time.perf_counter() - begin)
                made.append(masks.seconds[-1])
            token = choose(mask, stop, rng)
            if token is None or count > 200 or len(made) >= num_tokens:
                masks.close(request)
                break
            begin, count = time.perf_counter(), count + 1
            masks.accept(request, token)
            masks.poll()
    return made, trips


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masks", description=__doc__)
    parser.add_argument("--tokens", type=int, default=3000, help="of each grammar")
    options = parser.parse_args()
    print("| vocabulary | grammar | median, µs | p99, µs | longest, µs | round trip, µs |\n|--:|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for model, size, stop in ((DEMO, 2048, 1), (large_vocabulary(Path(folder), 150_000), 150_000, 0)):
            masks = Watched(model, size, stop)
            for name, (kind, text) in GRAMMARS.items():
                made, trips = measure(masks, composed(GrammarSource(kind, text, ""), in_lark), stop, options.tokens)
                shown = [
                    statistics.median(made),
                    statistics.quantiles(made, n=100)[98],
                    max(made),
                    statistics.median(trips),
                ]
                print(f"| {size:,} | {name} | " + " | ".join(f"{it * 1e6:,.0f}" for it in shown) + " |", flush=True)
            masks.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
