"""The front process: engine, catalogue and HTTP, from start to exit."""

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from adapters_store.catalog import Catalog, CatalogEntry
from adapters_store.declared_base import names_of_base
from adapters_store.errors import AdapterError
from adapters_store.room import Room
from adapters_store.verifier import Verifier
from adapters_store.verify import Unforeseen
from server.api.adapters import register, verified
from server.api.app import create_app
from server.api.service import Service
from server.api.text import Text
from server.config import ServerConfig
from server.engine.messages import Progress
from server.engine_child import EngineChild
from server.errors import ShuttingDown, StartupError
from server.kernels_name import check_kernels_are_ours
from server.metrics import Metrics

log = logging.getLogger("heddle")
EXIT_ENGINE_DEAD = 70  # EX_SOFTWARE: a supervisor restarts the server
EXIT_STOPPED_EARLY = 130  # as a shell reports Ctrl-C: a signal came before the server was ready


@dataclass(frozen=True)
class Reports:
    """Whom to tell what, while the server starts."""

    progress: Callable[[Progress], None]
    adapter: Callable[[str, CatalogEntry | AdapterError], None]
    ready: Callable[[Service, str], None]  # with the URL


async def serve(config: ServerConfig, reports: Reports) -> int:
    """Serve until a signal or the engine's death; returns the exit status."""
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    check_kernels_are_ours()
    text = Text.load(Path(config.engine.model_dir))
    with _bind(config.host, config.port) as listener:  # now, not after minutes of loading
        child, verifier = EngineChild(), Verifier(config.verify_timeout_s)
        try:
            service = await _unless_stopped(_start(config, text, child, verifier, reports), stopping)
            if service is None:
                return EXIT_STOPPED_EARLY
            return await _serve_http(service, child, listener, stopping, reports)
        finally:
            await verifier.close()
            await child.stop()


async def _start(config: ServerConfig, text: Text, child: EngineChild, verifier: Verifier, reports: Reports) -> Service:
    info = await child.start(config.engine, reports.progress, config.startup_timeout_s)
    room = Room(info.adapter_bytes, 4 if info.dtype == "float32" else 2, info.max_experts_per_adapter)
    names = (*names_of_base(config.engine.model_dir), *config.base_names)
    catalog = Catalog(config.base_name, info.base, config.roots, room, names)
    service = Service(config, info, child.client, catalog, verifier, text, Metrics(child.client), int(time.time()))
    await _register_directory(service, reports)
    return service


async def _unless_stopped(work: Coroutine[Any, Any, Service], stopping: asyncio.Event) -> Service | None:
    """The result of `work`, or None if a signal comes first; `work` is then cancelled."""
    working, stop = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait((working, stop), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        stop.cancel()


def _bind(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartupError(f"cannot listen on {host}:{port} ({error.strerror})") from None
    return listener


async def _register_directory(service: Service, reports: Reports) -> None:
    """Every sub-directory of --adapters. One that is refused is reported, and does not keep the others from serving."""
    if service.config.adapters_dir is None:
        return
    try:
        names = sorted(os.listdir(service.config.adapters_dir))
    except OSError as error:
        raise StartupError(f"the adapter directory cannot be read ({error.strerror})") from None
    for name in names:
        path = os.path.abspath(os.path.join(service.config.adapters_dir, name))
        if name.startswith(".") or os.path.isfile(path):
            continue
        outcome: CatalogEntry | AdapterError
        try:
            outcome = await verified(name, path, service)
            register(outcome, service)
        except AdapterError as refusal:
            outcome = refusal
        except Exception as error:  # whatever it is, it is this adapter's failure
            outcome = Unforeseen(error)
            log.error("an adapter could not be registered: %s", outcome.details)
        reports.adapter(name, outcome)


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: we drain first."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


async def _serve_http(
    service: Service, child: EngineChild, listener: socket.socket, stopping: asyncio.Event, reports: Reports
) -> int:
    server = _Server(
        uvicorn.Config(
            create_app(service),
            log_level="warning",
            access_log=False,
            lifespan="off",
            http="h11",
            h11_max_incomplete_event_size=64 << 10,
            timeout_graceful_shutdown=5,
        )
    )
    http = asyncio.ensure_future(server.serve(sockets=[listener]))
    pump = asyncio.ensure_future(child.client.pump())
    death = asyncio.ensure_future(child.wait())
    stop = asyncio.ensure_future(stopping.wait())
    try:
        while not server.started and not http.done():
            await asyncio.sleep(0.01)
        reports.ready(service, _url(listener))
        await asyncio.wait((http, pump, death, stop), return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            await _drain(service)
        elif death.done() or pump.done():
            await _report_death(service, death.result() if death.done() else f"unreadable: {pump.exception()!r}")
        server.should_exit = True
        await http
        return 0 if stop.done() else EXIT_ENGINE_DEAD
    finally:
        for task in (http, pump, death, stop):
            task.cancel()


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


async def _report_death(service: Service, how: str) -> None:
    """End every stream with an error and answer 503 for a while, so that clients and probes see what happened."""
    log.error("the engine process has ended (%s); the server will exit", how)
    service.client.declare_dead(f"the engine process has ended ({how})")
    await asyncio.sleep(service.config.engine_death_grace_s)


async def _drain(service: Service) -> None:
    """Take nothing new, let what runs finish for a while, and end the rest with an error event."""
    service.is_draining = True
    await service.verifier.close()
    deadline = time.monotonic() + service.config.drain_s
    while service.client.num_requests and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    if service.client.num_requests:
        log.warning("%d requests did not finish in %.0f s", service.client.num_requests, service.config.drain_s)
        service.client.end_streams(ShuttingDown())
