"""Trains the base model from nothing: plain next-token prediction with a load-balancing loss for the experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DeepseekV2ForCausalLM, PreTrainedTokenizerFast

from demo.corpus import documents
from demo.guidance import guidance_loss
from demo.model import build_model, build_tokenizer, render
from demo.muon import Muon

STEPS = 1200
TOKENS = 2048  # per step
ROW, LONG_ROW, LONG_EVERY = 128, 512, 8  # every eighth step sees long rows, so that long chats work too
MUON_RATE, ADAM_RATE, WARMUP = 0.02, 4e-3, 40
BALANCE, GUIDANCE = 0.01, 0.1  # weights of the load-balancing and the attention loss


def token_rows(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of packed documents, [rows, ROW] or [rows, LONG_ROW], TOKENS tokens each."""
    buffer: list[int] = []
    step = 0
    for document in documents(seed):
        buffer += tokenizer(render(document), add_special_tokens=False)["input_ids"]
        while len(buffer) >= TOKENS:
            step += 1
            width = LONG_ROW if step % LONG_EVERY == 0 else ROW
            yield torch.tensor(buffer[:TOKENS]).view(-1, width)
            del buffer[:TOKENS]


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Switch-style balance: experts * sum(share of selections * mean gate), 1.0 when even (arXiv 2101.03961, eq. 4).

    ``router_logits`` holds one [tokens, experts] tensor per MoE layer.
    """
    losses = []
    for logits in router_logits:
        gates = logits.view(-1, logits.shape[-1]).softmax(-1)
        chosen = torch.zeros_like(gates).scatter_(1, gates.topk(top_k, dim=-1).indices, 1.0 / top_k)
        losses.append(gates.shape[-1] * (chosen.mean(0) * gates.mean(0)).sum())
    return torch.stack(losses).mean()


def rate(step: int, steps: int) -> float:
    """Learning rate factor: linear warm-up, flat, then linear to zero over the last 40 %."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (0.4 * steps))


def optimizers_of(model: DeepseekV2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, routers and norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and "embed" not in name and ".gate.weight" not in name
        (matrices if is_matrix else others).append(parameter)
    return [Muon(matrices, MUON_RATE), torch.optim.AdamW(others, ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)]


def train_base(out: Path, seed: int, steps: int = STEPS) -> int:
    """Trains tokenizer and model and saves both to ``out`` (weights in bf16); returns the number of steps."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(documents(seed))
    model = build_model(tokenizer)
    model.set_experts_implementation("grouped_mm")
    model.set_attn_implementation("eager")  # the one that returns its attention weights
    optimizers = optimizers_of(model)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    batches = token_rows(tokenizer, seed)
    bar = tqdm(range(steps), desc="base", unit="step")
    model.train()
    for step in bar:
        for optimizer, peak in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(step, steps)
        tokens = next(batches)
        output = model(input_ids=tokens, use_cache=False, output_router_logits=True, output_attentions=True)
        loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        balance = balance_loss(output.router_logits, model.config.num_experts_per_tok)
        guidance = guidance_loss(output.attentions, tokens)
        (loss + BALANCE * balance + GUIDANCE * guidance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(
                loss=f"{loss.item():.3f}", balance=f"{balance.item():.2f}", guidance=f"{guidance.item():.2f}"
            )
    model.set_experts_implementation("eager")
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return steps
