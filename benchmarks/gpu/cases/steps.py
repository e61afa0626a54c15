"""What lays a step's tokens out from its sequences: decodes of Llama-3.1-8B's contexts, and prompts beside them."""

from collections.abc import Callable, Iterator
from itertools import accumulate

import torch
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Draw
from kernels.step_rows import Sequences, StepRows


def step_rows(draw: Draw) -> Iterator[Case]:
    for count in (1, 32, 256) if not draw.scale.is_toy else (3,):
        yield _case(draw, f"{count} decodes", [1] * count)
    decodes = draw.scale.size(31, 2)
    yield _case(draw, f"{decodes} decodes and a prompt", [*[1] * decodes, draw.scale.size(225, 5)])


def _case(draw: Draw, name: str, lengths: list[int]) -> Case:
    from kernels.step_rows import kernel, reference

    count, total, size = len(lengths), sum(lengths), draw.scale.size(16, 4)
    kv_lens = [length + draw.rng.randrange(draw.scale.size(1024, 9)) for length in lengths]
    width = max(kv_lens) // size + 1
    seats, sources = list(range(count + 1)), [draw.rng.choice([-1, index]) for index in range(count)]
    draw.rng.shuffle(seats)
    slots = [draw.rng.randrange(9) for _ in lengths]
    numbers = ([0, *accumulate(lengths)], kv_lens, seats[:count], slots, sources)
    sequences = Sequences(*map(draw.ints, numbers))
    tables = torch.randperm((count + 1) * width, device=draw.device).int().view(count + 1, width)
    chosen = torch.randint(100, (count,), device=draw.device)
    ids = torch.randint(100, (total,), dtype=torch.int32, device=draw.device)
    is_read = torch.arange(width, device=draw.device) < ((sequences.kv_lens + size - 1) // size)[:, None]

    def rows() -> StepRows:
        return StepRows(
            ids.clone(), *draw.zeros(3 * total).view(3, total), draw.zeros(count * width).view(count, width)
        )

    def laid_out(function: Callable[..., None]) -> tuple[Tensor, ...]:
        to = rows()
        function(sequences, tables, chosen, size, to)
        return *to[:4], to.block_tables * is_read

    to = rows()
    num_bytes = 4 * (5 * count + 4 * total + 2 * int(is_read.sum()))
    return Case("step_rows", name, draw.dtype, lambda: laid_out(kernel.step_rows),
                lambda: laid_out(reference.step_rows), [lambda: kernel.step_rows(sequences, tables, chosen, size, to)],
                num_bytes, exact=True)  # fmt: skip
