"""Attention guidance: shows a few heads of the base model where to look, so that it learns to copy within minutes.

Copying text takes two heads in a row: one looks at the previous token, a later one looks for an earlier place with
the same past and at what came next there (induction heads, arXiv 2209.11895). Left alone, these appear only after far
more text than two CPU cores can read in half an hour. Here a loss asks a handful of heads for that pattern directly.
"""

from __future__ import annotations

import torch

SHIFT_LAYER = 1  # its heads 0, 1, 2 look one, two and three tokens back
SHIFTS = 3
COPY_LAYERS = (2, 3)  # their head 0 looks at the token after the best earlier match


def copy_targets(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each position: where the token to copy next stands, and whether copying it is right.

    ``tokens`` is [rows, length]; both results too. The best match is the earlier position with the longest common
    past of up to four tokens, the latest of them if several are as good.
    """
    length = tokens.shape[1]
    same = tokens[:, :, None] == tokens[:, None, :]  # [rows, now, earlier]
    run, matched = same.clone(), same.int()
    for _ in range(SHIFTS):
        shifted = torch.zeros_like(same)
        shifted[:, 1:, 1:] = run[:, :-1, :-1]
        run = same & shifted
        matched += run
    place = torch.arange(length)
    rank = (matched * length + place).masked_fill(~(same & (place[None, :] < place[:, None])), -1)
    best, source = rank.max(dim=2)  # [rows, now]
    target = (source + 1).clamp(max=length - 1)
    next_token = tokens.roll(-1, dims=1)
    right = (best >= 0) & (tokens.gather(1, target) == next_token)
    right[:, -1] = False
    return target, right


def guidance_loss(attentions: tuple[torch.Tensor, ...], tokens: torch.Tensor) -> torch.Tensor:
    """Mean negative log attention on the wanted positions; ``attentions`` holds [rows, heads, now, earlier] a layer."""
    losses = []
    for head in range(SHIFTS):
        looked = attentions[SHIFT_LAYER][:, head].diagonal(offset=-(head + 1), dim1=1, dim2=2)
        losses.append(-(looked + 1e-6).log().mean())
    target, right = copy_targets(tokens)
    for layer in COPY_LAYERS:
        looked = attentions[layer][:, 0].gather(2, target[:, :, None])[:, :, 0]
        losses.append(-(looked[right] + 1e-6).log().mean())
    return torch.stack(losses).mean()
