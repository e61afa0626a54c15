"""What a process of its own does for the server, seen from inside: jobs come in and answers go out as messages, each
behind its length in eight bytes, until no more come. worker.py is the server's side."""

import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

MAX_ANSWER_BYTES = 64 << 20
READY = b"\n"  # written once, when all is imported
# so much less of a busy processor than those who decode: about a tenth, so that it still comes to its end
NICENESS = 10


def serve(answer: Callable[[bytes], bytes], answers_out: BinaryIO | None = None, niceness: int = NICENESS) -> None:
    """Answer jobs from standard input, one after another, on standard output if nowhere else."""
    _give_way(niceness)
    jobs_in, answers_out = sys.stdin.buffer, answers_out or sys.stdout.buffer
    answers_out.write(READY)
    answers_out.flush()
    while (frame := _read_frame(jobs_in)) is not None:
        encoded = answer(frame)
        answers_out.write(len(encoded).to_bytes(8, "little") + encoded)
        answers_out.flush()


def _give_way(niceness: int) -> None:
    """To the engine, all threads of which wait for one that was put aside.

    Where the kernel schedules sessions as groups (autogroup), each worker is one: it has a session of its own. Then
    the group's niceness counts.
    """
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, max(niceness, os.getpriority(os.PRIO_PROCESS, 0)))
    with suppress(OSError), open("/proc/self/autogroup", "w") as group:
        group.write(str(niceness))


def limit(kind: int, value: int) -> None:
    """As far as whoever started the server has not set less."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _read_frame(stream: BinaryIO) -> bytes | None:
    prefix = stream.read(8)
    return stream.read(int.from_bytes(prefix, "little")) if len(prefix) == 8 else None
