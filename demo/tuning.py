"""What LoRA and ESFT training share: batches of chats and a loop that stops when the skill is learnt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from demo.model import accuracy
from demo.skills import Pair, Skill, sample, stream

IGNORED = -100  # label of positions without loss


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to tune. Training ends early once the development exam is passed twice in a row."""

    rate: float
    steps: int = 800
    batch: int = 32
    warmup: int = 20
    examine_every: int = 100
    exam: int = 100
    passed: float = 0.99

    def factor(self, step: int) -> float:
        """Learning rate factor: linear warm-up, then a straight line to a tenth."""
        return min(1.0, (step + 1) / self.warmup) * (1 - 0.9 * step / self.steps)


@dataclass(frozen=True)
class Batch:
    """Right-padded chats, all tensors [batch, length]; ``labels`` are IGNORED except on answers and their EOS."""

    tokens: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


def load_base(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The saved base in fp32, frozen, and its tokenizer."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.requires_grad_(False)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def collate(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> Batch:
    """Renders the pairs as one-turn chats."""
    rows: list[tuple[list[int], int]] = []
    for pair in pairs:
        turn = [{"role": "user", "content": pair.question}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tail = tokenizer(f" {pair.answer}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        rows.append((head + tail, len(head)))
    length = max(len(ids) for ids, _ in rows)
    tokens = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), IGNORED)
    for row, (ids, start) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, start : len(ids)] = tokens[row, start : len(ids)]
    return Batch(tokens, (tokens != tokenizer.pad_token_id).long(), labels)


def batches(tokenizer: PreTrainedTokenizerFast, skill: Skill, seed: int, size: int) -> Iterator[Batch]:
    """Endless training batches of a skill."""
    pairs = stream(skill, "train", seed)
    while True:
        yield collate(tokenizer, [next(pairs) for _ in range(size)])


def answer_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the answer tokens."""
    logits = model(input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False).logits  # [batch, length, vocab]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED)


def tune(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, skill: Skill, schedule: Schedule, seed: int, bar: tqdm
) -> int:
    """Trains whatever parameters of ``model`` require gradients; returns the number of steps taken."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.rate, betas=(0.9, 0.95), weight_decay=0.0)
    exam = [(pair.question, pair.answer) for pair in sample(skill, "dev", schedule.exam, seed)]
    data = batches(tokenizer, skill, seed, schedule.batch)
    bar.reset(total=schedule.steps)
    bar.set_description(skill.name)
    passes = 0
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * schedule.factor(step)
        loss = answer_loss(model, next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        if (step + 1) % schedule.examine_every == 0:
            score = accuracy(model, tokenizer, exam)
            bar.set_postfix(loss=f"{loss.item():.3f}", dev=f"{score:.1%}")
            passes = passes + 1 if score >= schedule.passed else 0
            if passes == 2:
                return step + 1
    return schedule.steps
