"""This process's memory as its kernel counts and guards it."""

import faulthandler
import os

import torch

from server.weights.arena import VirtualArena


def resident_bytes() -> int:
    """This process's anonymous memory, as the kernel counts it."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def touches_unmapped(arena: VirtualArena, offset: int) -> bool:
    """Whether reading there kills a child process: the wanted, loud failure."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # the fault is wanted; its report is not
        arena.tensor(offset, (1,), torch.uint8).item()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
