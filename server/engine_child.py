"""The engine process as the front sees it: start it, follow its start, notice its end, stop it."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import zmq

from server.config import EngineConfig
from server.engine.client import EngineClient
from server.engine.introductions import Packages
from server.engine.link import FrontLink
from server.engine.messages import Configure, EngineInfo, Progress
from server.errors import StartupError

STOP_TIMEOUT_S = 10.0
# how long an idle thread of the engine spins for its next piece of work. OpenMP's default is milliseconds, which on a
# machine that is also busy with something else costs everybody their time slices (benchmarks/README.md)
SPIN_COUNT = "1000"


class EngineChild:
    """One engine process and the link to it. `client` speaks to it once `start` has returned."""

    def __init__(self, directory: Path, packages: Packages) -> None:
        # a socket file in a `directory` of our own (mode 0700): no port, and nobody else's to connect to
        self._address = f"ipc://{directory}/engine"
        try:
            self._link = FrontLink(self._address)
        except zmq.ZMQError as error:
            raise StartupError(f"cannot make a socket below {str(directory)!r} ({error})") from None
        self._process: asyncio.subprocess.Process | None = None
        self._is_ready = False
        self.client = EngineClient(self._link, packages)

    async def start(
        self, config: EngineConfig, on_progress: Callable[[Progress], None], timeout_s: float
    ) -> EngineInfo:
        """Start the process and wait until it can serve. Raises ConfigError or StartupError with its reason."""
        root = str(Path(__file__).resolve().parent.parent)
        environment = {
            "GOMP_SPINCOUNT": SPIN_COUNT,
            "TRITON_DEFAULT_FP_FUSION": "1",  # as in every released Triton so far; unset, it warns
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        }
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "server.engine_process", self._address, str(os.getpid()),
            stdin=asyncio.subprocess.DEVNULL, env=environment,
            start_new_session=True,  # Ctrl-C is for the front, which then stops the engine in order
        )  # fmt: skip
        self._link.send(Configure(config))
        ready = asyncio.ensure_future(self.client.wait_ready(on_progress))
        ended = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait((ready, ended), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done() and ended.done():
                await asyncio.wait((ready,), timeout=0.5)  # its last words may still be on the way
            if ready.done():
                info = ready.result()
                self._is_ready = True
                return info
            if ended.done():
                raise StartupError(f"the engine process ended during its start ({describe_exit(ended.result())})")
            raise StartupError(f"the engine was not ready after {timeout_s:.0f} s")
        finally:
            ready.cancel()
            ended.cancel()

    async def wait(self) -> str:
        """Wait for the process to end by itself; returns how it ended."""
        if self._process is None:
            raise StartupError("the engine was not started")
        return f"its process has ended: {describe_exit(await self._process.wait())}"

    async def stop(self) -> None:
        """Ask it to end, and make it if it does not; one that still loads is not asked. Safe in any state."""
        if self._process is not None and self._process.returncode is None:
            if self._is_ready and self.client.death is None:
                self.client.shut_down()
            else:  # it would not hear
                self._process.kill()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._link.close()


def describe_exit(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"
