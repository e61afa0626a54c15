"""Child processes with a time limit for all of them together."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
_GRACE_S = 5.0  # in which a process that is told to end may print where it hangs


def run_limited(commands: Sequence[Sequence[str]], limit_s: float) -> list[str]:
    """Run all at once; how each ended: "well", or what came between. What they started ends with them."""
    deadline = time.monotonic() + limit_s
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            # a group of its own, to be ended as a whole, but in our session: whoever ends that ends all
            processes.append(subprocess.Popen(command, cwd=ROOT, process_group=0))
        return [_ending(process, deadline, limit_s) for process in processes]
    finally:
        _end([process for process in processes if process.poll() != 0])


def _ending(process: subprocess.Popen[bytes], deadline: float, limit_s: float) -> str:
    try:
        status = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return f"it did not end in {limit_s:g} s"
    if status < 0:
        return f"it was ended by {signal.Signals(-status).name}"
    return f"its exit status was {status}" if status else "well"


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for how, grace_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, 60.0)):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace_s)
