"""Transformers' generate and PEFT, asked in lines of JSON: first what to load, then one batch after the other."""
# /// script
# dependencies = ["transformers==5.23.0", "torch==2.13.0", "peft==0.21.2"]
# ///

import json
import sys
import time

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, LogitsProcessor


class Clock(LogitsProcessor):
    """When the logits of each token were there."""

    def __init__(self):
        self.times = []

    def __call__(self, input_ids, scores):
        self.times.append(time.perf_counter())
        return scores


def load(base, adapters):
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if not adapters:
        return plain, None
    names = list(adapters)
    wrapped = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(wrapped, adapters[names[0]], names[0])
    for name in names[1:]:
        wrapped.load_adapter(adapters[name], name)
    return plain, wrapped.eval()


@torch.inference_mode()
def generate(plain, wrapped, jobs, new_tokens):
    start, clock = time.perf_counter(), Clock()
    longest = max(len(it["prompt"]) for it in jobs)
    ids = torch.tensor([[0] * (longest - len(it["prompt"])) + it["prompt"] for it in jobs])
    mask = torch.tensor([[0] * (longest - len(it["prompt"])) + [1] * len(it["prompt"]) for it in jobs])
    names = [it["adapter"] for it in jobs]
    model, more = wrapped, {}
    if not any(names):
        model = plain
    elif len(set(names)) == 1:
        wrapped.set_adapter(names[0])
    else:
        more = {"adapter_names": [name or "__base__" for name in names]}
    told = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                          do_sample=False, pad_token_id=0, logits_processor=[clock], **more)  # fmt: skip
    end = time.perf_counter() - start
    times = [at - start for at in clock.times]
    return [{"tokens": row[longest:].tolist(), "sent": 0.0, "end": end, "times": times} for row in told]


def main():
    asked = json.loads(sys.stdin.readline())
    torch.set_num_threads(asked["threads"])
    plain, wrapped = load(asked["base"], asked["adapters"])
    found = {it.__name__: it.__version__ for it in (torch, transformers, peft)}
    print(json.dumps({"versions": found}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({"answers": generate(plain, wrapped, asked["jobs"], asked["new_tokens"])}), flush=True)


if __name__ == "__main__":
    main()
