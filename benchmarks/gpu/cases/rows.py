"""What works on each row for itself: norms, rotary embeddings, sampling, log-probabilities."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Draw
from benchmarks.gpu.cases.layer import norm_after_lora
from kernels.logprobs import Logprobs
from kernels.sampling import Edits, Parameters, Sampled


def rms_norm(draw: Draw) -> Iterator[Case]:
    from kernels.rms_norm import kernel, reference

    for rows in draw.token_counts[:5]:
        x, residual = (draw.randn(rows, draw.scale.size(4096, 40)) for _ in range(2))
        alone, both = (x, draw.randn(x.shape[1]), 1e-6), (x, residual, draw.randn(x.shape[1]), 1e-6)
        yield Case("rms_norm", f"{rows} rows", draw.dtype, lambda it=alone: kernel.rms_norm(*it),
                   lambda it=alone: reference.rms_norm(*it), [lambda it=alone: kernel.rms_norm(*it)],
                   2 * x.nbytes)  # fmt: skip
        yield Case("rms_norm", f"{rows} rows and a residual", draw.dtype, lambda it=both: kernel.add_rms_norm(*it),
                   lambda it=both: reference.add_rms_norm(*it), [lambda it=both: kernel.add_rms_norm(*it)],
                   4 * x.nbytes)  # fmt: skip
    yield from norm_after_lora(draw)


def rope(draw: Draw) -> Iterator[Case]:
    from kernels.rope import kernel, reference

    dim = draw.scale.size(128, 16)
    for tokens in draw.token_counts:
        query = draw.randn(1, tokens, draw.scale.size(32, 4), dim).transpose(1, 2)
        key = draw.randn(1, tokens, draw.scale.size(8, 2), dim).transpose(1, 2)
        angle = torch.randn(1, tokens, dim // 2, device=draw.device).repeat(1, 1, 2)
        it = (query, key, angle.cos().to(draw.dtype), angle.sin().to(draw.dtype))
        yield Case("rope", f"{tokens} tokens", draw.dtype, lambda it=it: kernel.rope(*it),
                   lambda it=it: reference.rope(*it), [lambda it=it: kernel.rope(*it)],
                   2 * (query.nbytes + key.nbytes))  # fmt: skip


def sampling(draw: Draw) -> Iterator[Case]:
    kinds = (("greedy", 0.0, 0, 1.0), ("temperature", 1.0, 0, 1.0), ("top-p", 1.0, 0, 0.9),
             ("top-k and top-p", 1.0, 50, 0.9))  # fmt: skip
    for rows in (2,) if draw.scale.is_toy else (1, 32, 256):
        vocabulary = draw.scale.size(128256, 199)
        logits = [draw.randn(rows, vocabulary, scale=2.5) for _ in range(draw.scale.copies(rows * vocabulary * 2))]
        for name, temperature, top_k, top_p in kinds:
            yield _sampling_case(draw, name, logits, temperature, top_k, top_p)
        yield _sampling_case(draw, "top-k and top-p behind masks", logits, 1.0, 50, 0.9, _masks(draw, logits[0]))
        if rows <= 32:
            edits = _penalties(draw, logits[0], draw.scale.size(2048, 20))
            yield _sampling_case(draw, "penalties", logits, 0.0, 0, 1.0, edits)


def _sampling_case(
    draw: Draw, name: str, logits: list[Tensor], temperature: float, top_k: int, top_p: float,
    edits: Edits | None = None,
) -> Case:  # fmt: skip
    from kernels.sampling import kernel, reference

    rows = len(logits[0])

    def full(value: float) -> Tensor:
        return torch.full((rows,), value, device=draw.device)

    asked = Parameters(full(temperature), full(top_k).int(), full(top_p), full(0.0), torch.rand(rows).to(draw.device))
    # among 128 thousand tokens a sum in another order moves a boundary past a draw now and then
    is_drawn = temperature > 0 and top_k == 0

    def run(sample: Callable[..., Sampled]) -> Tensor:
        tokens = sample(logits[0], asked, edits).tokens
        return _misses(logits[0], tokens, asked.draws, top_p) if is_drawn else tokens

    def on_host(logits: Tensor, asked: Parameters, edits: Edits | None) -> Sampled:
        """The reference's edits are the CPU's."""
        if edits is None:
            return reference.sample(logits, asked)
        there = reference.sample(
            logits.cpu(), Parameters(*(it.cpu() for it in asked)), Edits(*(it.cpu() for it in edits))
        )
        return Sampled(*(it.to(draw.device) for it in there))

    return Case("sampling", f"{name}, {rows} rows", draw.dtype, lambda: run(kernel.sample), lambda: run(on_host),
                [lambda it=it: kernel.sample(it, asked, edits) for it in logits], logits[0].nbytes,
                exact=True)  # fmt: skip


def _masks(draw: Draw, logits: Tensor) -> Edits:
    """A mask for each row, of half of the vocabulary."""
    rows, vocabulary = logits.shape
    masks = torch.randint(-(2**31), 2**31, (rows, -(-vocabulary // 32)), dtype=torch.int32, device=draw.device)
    starts, ints, floats = draw.zeros(1), draw.zeros(0), torch.empty(0, device=draw.device)
    numbers = draw.ints([*range(rows)])
    return Edits(masks, numbers, torch.full_like(numbers, -1), starts, ints, floats, starts, ints, starts, ints, ints,
                 floats, floats, floats)  # fmt: skip


def _penalties(draw: Draw, logits: Tensor, length: int) -> Edits:
    """Of a history of so many tokens for each row, half of them its prompt."""
    rows, vocabulary = logits.shape
    numbers, none, ints = draw.ints([*range(rows)]), draw.zeros(rows + 1), draw.zeros(0)
    history = torch.randint(vocabulary, (rows * length,), dtype=torch.int32, device=draw.device)
    half = torch.full((rows,), 0.5, device=draw.device)
    return Edits(draw.zeros(0).view(0, 0), torch.full_like(numbers, -1), numbers, none, ints, half[:0], none, ints,
                 draw.ints([*range(0, rows * length + 1, length)]), history, torch.full_like(numbers, length // 2),
                 half, half, half + 1)  # fmt: skip


def _misses(logits: Tensor, tokens: Tensor, draws: Tensor, top_p: float) -> Tensor:
    """1 for each row whose draw lies further than 1e-4 from its token's part of what is kept, in float64."""
    parts = logits.double().softmax(-1)
    order = parts.sort(dim=-1, descending=True, stable=True)
    kept = order.values.cumsum(-1) - order.values < top_p
    parts = parts * torch.zeros_like(kept).scatter_(-1, order.indices, kept)
    ends = parts.cumsum(-1).gather(-1, tokens[:, None])[:, 0]
    begins = ends - parts.gather(-1, tokens[:, None])[:, 0]
    drawn = draws * parts.sum(-1)
    return ((drawn < begins - 1e-4) | (drawn > ends + 1e-4)).float()


def logprobs(draw: Draw) -> Iterator[Case]:
    for rows in (2,) if draw.scale.is_toy else (1, 32, 256):
        vocabulary = draw.scale.size(128256, 199)
        logits = [draw.randn(rows, vocabulary) for _ in range(draw.scale.copies(rows * vocabulary * 2))]
        for num in (0, 5, 20):
            yield _logprobs_case(draw, logits, num)


def _logprobs_case(draw: Draw, logits: list[Tensor], num: int) -> Case:
    from kernels.logprobs import kernel, reference

    tokens = torch.randint(logits[0].shape[1], (len(logits[0]),), device=draw.device)

    def run(logprobs: Callable[..., Logprobs]) -> tuple[Tensor, ...]:
        got = logprobs(logits[0], tokens, num)
        parts = logits[0].double().log_softmax(-1)
        pairs = ((got.chosen, parts.gather(-1, tokens[:, None])[:, 0]), (got.top, parts.gather(-1, got.ids)))
        return got.rank, got.ids, *((said - exact).abs() > 1e-3 for said, exact in pairs)

    return Case("logprobs", f"{num} of {len(logits[0])} rows", draw.dtype, lambda: run(kernel.logprobs),
                lambda: run(reference.logprobs), [lambda it=it: kernel.logprobs(it, tokens, num) for it in logits],
                logits[0].nbytes, exact=True)  # fmt: skip
