"""What a streamed token costs the front process: CPU time, user and system, with many streams at once.

    python -m benchmarks.front [--write]           (make bench-front)

A real server over a model of one small layer, so that the engine keeps up, and clients that count events and parse
nothing. What requests cost besides their tokens is taken off: the same requests are made for one token each. Exit
status 1 where the median is above LIMIT_US. --write puts the result into benchmarks/results/front.md.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from datetime import date
from pathlib import Path

import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.served import ROOT, Heddle

LIMIT_US = 60.0
RESULTS = ROOT / "benchmarks" / "results" / "front.md"
ROUTES = ("/v1/completions", "/v1/chat/completions")
VOCAB = 94  # characters that print, so that every token is an event
TEMPLATE = "{% for it in messages %}{{ it.role }}: {{ it.content }}\n{% endfor %}a:"


def make_model(directory: Path) -> None:
    """One layer, a token a character, no end of sequence, no adapters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=VOCAB, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    base = directory / "base"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base)
    (directory / "adapters").mkdir()
    vocab = {chr(ord("!") + index): index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))


async def _stream(port: int, route: str, tokens: int) -> int:
    """Ask for one stream and read it to its end; the number of its events."""
    asked = {"messages": [{"role": "user", "content": "hello"}]} if "chat" in route else {"prompt": "hello"}
    body = json.dumps({"model": "bench-base", "max_tokens": tokens, "stream": True, **asked}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    num_events, tail = 0, b""
    while b"data: [DONE]" not in tail:
        arrived = await reader.read(1 << 16)
        if not arrived:
            raise RuntimeError(f"a stream broke off: {tail.decode()}")
        num_events += arrived.count(b"data: {")
        tail = tail[-64:] + arrived
    writer.close()
    return num_events


async def _streams(port: int, route: str, count: int, tokens: int) -> int:
    return sum(await asyncio.gather(*(_stream(port, route, tokens) for _ in range(count))))


def _cpu_seconds(process: psutil.Process) -> float:
    """Its own, without its children's."""
    times = process.cpu_times()
    return float(times.user + times.system)


def cost_us(front: psutil.Process, port: int, route: str, streams: int, tokens: int) -> float:
    """Microseconds of CPU time a token."""
    costs: list[float] = []
    for count in (1, tokens):
        before = _cpu_seconds(front)
        num_events = asyncio.run(_streams(port, route, streams, count))
        costs.append(_cpu_seconds(front) - before)
        if num_events != streams * count:
            raise RuntimeError(f"{num_events} events of {streams * count} tokens")
    return (costs[1] - costs[0]) / (streams * (tokens - 1)) * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory() as made:
        make_model(Path(made))
        server = Heddle(Path(made), options=["--threads", "1", "--max-running", str(options.streams)])
        try:
            for route in ROUTES:
                costs = [cost_us(server.front, server.port, route, options.streams, options.tokens)
                         for _ in range(options.rounds)]  # fmt: skip
                worst = max(worst, statistics.median(costs))
                rows.append(f"| `{route}` | {statistics.median(costs):.1f} | {min(costs):.1f} to {max(costs):.1f} |")
                print(rows[-1], flush=True)
        finally:
            server.stop()
    if options.write:
        RESULTS.write_text(
            "# A streamed token in the front process\n\n"
            f"On {os.cpu_count()} cores; `make bench-front`, {date.today()}, {options.streams} streams at once, "
            f"{options.tokens} tokens each, {options.rounds} rounds; CPU time of the front process, user and system. "
            f"The limit is {LIMIT_US:g} µs."
            "\n\n"
            "| route | µs a token, median | lowest to highest round |\n|---|---:|---:|\n" + "\n".join(rows) + "\n"
        )
    return int(worst > LIMIT_US)


if __name__ == "__main__":
    sys.exit(main())
