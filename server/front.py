"""The front process: engine, catalogue and HTTP, from start to exit."""

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from adapters_store.catalog import Catalog, CatalogEntry
from adapters_store.errors import AdapterError
from server.api.adapters import check_room, register
from server.api.app import create_app
from server.api.service import Service
from server.api.text import Text
from server.config import ServerConfig
from server.engine.messages import Progress
from server.engine_child import EngineChild
from server.errors import StartupError
from server.kernels_name import check_kernels_are_ours
from server.metrics import Metrics

log = logging.getLogger("heddle")
EXIT_ENGINE_DEAD = 70  # EX_SOFTWARE: a supervisor restarts the server


@dataclass(frozen=True)
class Reports:
    """Whom to tell what, while the server starts."""

    progress: Callable[[Progress], None]
    adapter: Callable[[str, CatalogEntry | AdapterError], None]
    ready: Callable[[Service], None]


async def serve(config: ServerConfig, reports: Reports) -> int:
    """Serve until a signal or the engine's death; returns the exit status."""
    check_kernels_are_ours()
    text = Text.load(Path(config.engine.model_dir))
    child = EngineChild()
    try:
        info = await child.start(config.engine, reports.progress, config.startup_timeout_s)
        catalog = Catalog(config.base_name, info.base, config.roots)
        service = Service(config, info, child.client, catalog, text, Metrics(child.client), int(time.time()))
        pump = asyncio.ensure_future(child.client.pump())
        await _register_directory(service, reports)
        try:
            return await _serve_http(service, child, reports)
        finally:
            pump.cancel()
    finally:
        await child.stop()


async def _register_directory(service: Service, reports: Reports) -> None:
    """Every sub-directory of --adapters. One that is refused is reported, and does not keep the others from serving."""
    if service.config.adapters_dir is None:
        return
    for directory in sorted(Path(service.config.adapters_dir).iterdir()):
        if not directory.is_dir() or directory.name.startswith("."):
            continue
        try:
            entry = await asyncio.to_thread(service.catalog.read, directory.name, str(directory.resolve()))
            check_room(entry, service)
            register(entry, service)
        except AdapterError as refusal:
            reports.adapter(directory.name, refusal)
        else:
            reports.adapter(directory.name, entry)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: we drain first."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


async def _serve_http(service: Service, child: EngineChild, reports: Reports) -> int:
    config = service.config
    server = _Server(
        uvicorn.Config(
            create_app(service),
            host=config.host,
            port=config.port,
            log_level="warning",
            access_log=False,
            lifespan="off",
            h11_max_incomplete_event_size=64 << 10,
            http="h11",
            timeout_graceful_shutdown=5,
        )  # fmt: skip
    )
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    http = asyncio.ensure_future(_run(server))
    death = asyncio.ensure_future(child.wait())
    stop = asyncio.ensure_future(stopping.wait())
    try:
        while not server.started and not http.done():
            await asyncio.sleep(0.01)
        if http.done():
            http.result()
            raise StartupError(f"cannot listen on {config.host}:{config.port}")
        reports.ready(service)
        await asyncio.wait((http, death, stop), return_when=asyncio.FIRST_COMPLETED)
        if death.done():
            await _report_death(service, death.result())
        elif stop.done():
            await _drain(service)
        server.should_exit = True
        await http
        return EXIT_ENGINE_DEAD if death.done() else 0
    finally:
        for task in (http, death, stop):
            task.cancel()


async def _run(server: uvicorn.Server) -> None:
    try:
        await server.serve()
    except SystemExit:  # uvicorn's way to say that the port is taken; it has logged why
        raise StartupError(f"cannot listen on {server.config.host}:{server.config.port}") from None


async def _report_death(service: Service, how: str) -> None:
    """End every stream with an error and answer 503 for a while, so that clients and probes see what happened."""
    log.error("the engine process has ended (%s); the server will exit", how)
    service.client.declare_dead(f"the engine process has ended ({how})")
    await asyncio.sleep(service.config.engine_death_grace_s)


async def _drain(service: Service) -> None:
    """Take nothing new, let what runs finish for a while, and end the rest with an error event."""
    service.is_draining = True
    deadline = time.monotonic() + service.config.drain_s
    while service.client.num_requests and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    if service.client.num_requests:
        log.warning("%d requests did not finish in %.0f s", service.client.num_requests, service.config.drain_s)
        service.client.end_streams("the server is shutting down")
