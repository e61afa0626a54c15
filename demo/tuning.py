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
from demo.pair import Pair, answer_of, prompt_of
from demo.skills import Skill, sample, stream

IGNORED = -100  # label of positions without loss


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to tune. Training ends early once the development exam is passed twice in a row.

    ``parts``: a batch is computed in so many, of like lengths; they save padding where chats differ much in length.
    """

    rate: float
    steps: int = 800
    batch: int = 32
    warmup: int = 20
    examine_every: int = 100
    exam: int = 100
    passed: float = 0.99
    parts: int = 1

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


def collate(tokenizer: PreTrainedTokenizerFast, template: str | None, pairs: list[Pair]) -> Batch:
    """Renders the pairs as chats; only the last answer of each is learnt."""
    rows: list[tuple[list[int], int]] = []
    for pair in pairs:
        head, tail = (
            tokenizer(part(tokenizer, template, pair), add_special_tokens=False)["input_ids"]
            for part in (prompt_of, answer_of)
        )
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
        yield collate(tokenizer, skill.template, [next(pairs) for _ in range(size)])


def in_parts(batch: Batch, count: int) -> Iterator[tuple[Batch, float]]:
    """A batch in parts, the short chats first, each with its share of the answer tokens."""
    lengths = batch.mask.sum(1)
    whole = (batch.labels != IGNORED).sum().item()
    for rows in lengths.argsort(stable=True).chunk(count):
        end = int(lengths[rows].max())
        part = Batch(batch.tokens[rows, :end], batch.mask[rows, :end], batch.labels[rows, :end])
        yield part, (part.labels != IGNORED).sum().item() / whole


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
    pairs = sample(skill, "dev", schedule.exam, seed)
    exam = [(prompt_of(tokenizer, skill.template, pair), pair.answer) for pair in pairs]
    data = batches(tokenizer, skill, seed, schedule.batch)
    bar.reset(total=schedule.steps)
    bar.set_description(skill.name)
    passes = 0
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate * schedule.factor(step)
        mean = 0.0
        for part, share in in_parts(next(data), schedule.parts):
            loss = answer_loss(model, part) * share
            loss.backward()
            mean += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        if (step + 1) % schedule.examine_every == 0:
            score = accuracy(model, tokenizer, exam)
            bar.set_postfix(loss=f"{mean:.3f}", dev=f"{score:.1%}")
            passes = passes + 1 if score >= schedule.passed else 0
            if passes == 2:
                return step + 1
    return schedule.steps
