"""The front process: engine, catalogue and HTTP, from start to exit."""

import asyncio
import gc
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from adapters_store.base_id import base_id
from adapters_store.catalog import Catalog, Found
from adapters_store.declared_base import names_of_base
from adapters_store.errors import AdapterError, Unforeseen
from adapters_store.formats import READER
from adapters_store.room import Room
from adapters_store.rules import Rules
from adapters_store.sources import FetchLimits
from adapters_store.sources.allowed import Allowed, parse_allowed
from adapters_store.sources.fetcher import Fetcher
from adapters_store.upload_files import UploadLimits
from adapters_store.uploads import Uploads
from adapters_store.verifier import Verifier
from server import listener, storage
from server.api.app import create_app
from server.api.service import Service
from server.api.texts.adapter_texts import AdapterTexts
from server.api.texts.speech import Formats
from server.api.texts.text import Text
from server.api.transport.connection import ConnectionLimits, limited
from server.config import ServerConfig
from server.engine.messages import EngineInfo, Progress
from server.engine_child import EngineChild
from server.errors import ConfigError, ShuttingDown, StartupError
from server.exits import EXIT_FAILED, EXIT_STOPPED_EARLY
from server.grammars.compiler import Compiler
from server.grammars.vocabulary_spec import VocabularySpec
from server.kernels_name import check_kernels_are_ours
from server.lifecycle.inspection import Inspection
from server.lifecycle.leases import Leases
from server.lifecycle.lifecycle import Lifecycle
from server.lifecycle.registry import Registry
from server.lifecycle.terms import Terms
from server.lifecycle.wish import Wish, source_path
from server.metrics import Metrics
from server.run_directory import RunDirectory

log = logging.getLogger("heddle")
SILENCE_CHECK_S = 1.0
LONGEST_STEPS = 10
MAX_HEAD_BYTES = 64 << 10
# largest difference from merged weights that is the rounding of the type, as a part of the largest logit
PARITY_BOUNDS = {"float32": 2e-3, "bfloat16": 0.25}


@dataclass(frozen=True)
class Reports:
    """Whom to tell what, while the server starts."""

    progress: Callable[[Progress], None]
    adapter: Callable[[str, Found | AdapterError], None]
    ready: Callable[[Service, str], None]  # with the URL


async def serve(config: ServerConfig, reports: Reports) -> int:
    """Serve until a signal or the engine's death; returns the exit status."""
    stopping = asyncio.Event()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        numbers.append(signal.SIGHUP)
    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the other cores are the engine's
    check_kernels_are_ours()
    text = Text.load(Path(config.engine.model_dir), Formats(config.tool_format, config.reasoning_format))
    # now, not after minutes of loading
    num_connections = listener.room_for_connections(config.max_connections)
    with listener.bind(config.host, config.port) as door, RunDirectory() as run:
        store, is_durable = storage.choose_store(config, run)
        registry = Registry(Catalog(config.base_name, config.max_adapters), store, is_durable)
        child, verifier = EngineChild(run.path, registry), Verifier(config.verify_timeout_s)
        try:
            service = await _unless_stopped(_start(config, text, child, verifier, registry, reports), stopping)
            if service is None:
                return EXIT_STOPPED_EARLY
            server = _http_server(service, num_connections)
            try:
                return await _serve_http(server, service, child, door, stopping, reports)
            finally:
                await service.grammars.close()
                await service.fetcher.close()
                service.uploads.close()
                await service.lifecycle.stop()
        finally:
            await verifier.close()
            await child.stop()
            await registry.close()


async def _start(
    config: ServerConfig, text: Text, child: EngineChild, verifier: Verifier, registry: Registry, reports: Reports
) -> Service:
    info = await child.start(config.engine, reports.progress, config.startup_timeout_s)
    if info.self_checked is not None:
        log.info("%s", info.self_checked)
    room = Room(info.adapter_bytes, 4 if info.dtype == "float32" else 2, info.max_experts_per_adapter)
    terms = _terms(config, info)
    storage.remember(registry.store, storage.Identity(config.base_name, info.base, room, terms))
    texts, metrics = AdapterTexts(text), Metrics(child.client, registry.catalog, info, config)
    inspection = Inspection(
        registry,
        Rules(info.base, config.roots, room),
        verifier,
        child.client,
        terms,
        base_id=partial(registry.base_id, partial(base_id, Path(config.engine.model_dir))),
        check_template=texts.for_template,
    )
    lifecycle = Lifecycle(inspection, child.client, Leases(), on_delete=metrics.forget_model)
    child.client.on_device.follow(lifecycle.moved)
    most = config.max_upload_bytes or 2 * info.adapter_bytes
    uploads = Uploads(registry.store.uploads, UploadLimits(max_upload_bytes=most))
    fetcher = Fetcher(_allowed(config), FetchLimits(max_bytes=most), config.fetch_timeout_s)
    vocabulary = VocabularySpec(config.engine.model_dir, info.vocab_size, tuple(sorted(info.stop_token_ids)))
    grammars = Compiler(vocabulary, config.grammar_timeout_s, config.max_grammar_bytes)
    started = int(time.time())
    service = Service(config, info, child.client, lifecycle, uploads, fetcher, texts, metrics, grammars, started)
    registry.load()
    if registry.store.journal.identity("reader") != READER:
        await lifecycle.read_again()
        registry.store.identify({"reader": READER})
    await _register_directory(service, reports)
    lifecycle.tell_pinned()
    return service


def _allowed(config: ServerConfig) -> Allowed:
    try:
        return parse_allowed(config.allow_sources)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _terms(config: ServerConfig, info: EngineInfo) -> Terms:
    names = (config.base_name, *names_of_base(config.engine.model_dir), *config.base_names)
    bound = PARITY_BOUNDS[info.dtype] if config.verify_bound is None else config.verify_bound
    most_pinned = max(1, info.adapter_slots // 2)
    return Terms(names, config.strict_base, bound, info.adapter_bytes // 2, most_pinned, info.graph_rank)


async def _unless_stopped(work: Coroutine[Any, Any, Service], stopping: asyncio.Event) -> Service | None:
    """The result of `work`, or None if a signal comes first; `work` is then cancelled."""
    working, stop = asyncio.ensure_future(work), asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait((working, stop), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        stop.cancel()


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
        outcome: Found | AdapterError
        try:
            job = source_path(service.lifecycle.inspection.rules, path, service.config.ignore_keys)
            outcome = (await service.lifecycle.register(Wish(name, job, is_durable=False), "--adapters")).found
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
    server: _Server,
    service: Service,
    child: EngineChild,
    door: socket.socket,
    stopping: asyncio.Event,
    reports: Reports,
) -> int:
    http = asyncio.ensure_future(server.serve(sockets=[door]))
    pump = asyncio.ensure_future(child.client.pump())
    ends = [asyncio.ensure_future(child.wait()), asyncio.ensure_future(_silence(service))]
    expiry = asyncio.ensure_future(service.lifecycle.expire())
    keep_alive = asyncio.ensure_future(service.client.mark_silence(service.config.keep_alive_s))
    stop = asyncio.ensure_future(stopping.wait())
    try:
        while not server.started and not http.done():
            await asyncio.sleep(0.01)
        gc.freeze()  # what was made until now stays: a collection that walked it would hold up everybody
        door.listen(listener.BACKLOG)  # asyncio has just set it to what it accepts at once
        storage.say_where(service.lifecycle.registry.store, listener.url(door))
        reports.ready(service, listener.url(door))
        await asyncio.wait((http, pump, stop, *ends), return_when=asyncio.FIRST_COMPLETED)
        if stop.done():
            await _drain(service)
        elif pump.done() or any(end.done() for end in ends):
            reason = next((end.result() for end in ends if end.done()), "") or f"it is unreadable: {pump.exception()!r}"
            await _report_death(service, reason)
        server.should_exit = True
        await http
        return 0 if stop.done() else EXIT_FAILED
    finally:
        storage.forget_where(service.lifecycle.registry.store)
        for task in (http, pump, stop, expiry, keep_alive, *ends):
            task.cancel()


def _http_server(service: Service, num_connections: int) -> _Server:
    config = service.config
    limits = ConnectionLimits(num_connections, config.header_timeout_s, config.body_timeout_s, config.write_timeout_s)
    return _Server(
        uvicorn.Config(
            create_app(service),
            log_level="error",  # its warnings are about what clients send, which is theirs to hear, not the log's
            access_log=False,
            lifespan="off",
            http=limited(limits),
            backlog=listener.ACCEPTED_AT_ONCE,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            timeout_graceful_shutdown=5,
        )
    )


async def _silence(service: Service) -> str:
    """Return once the engine has been silent for too long to come back.

    That is `engine_silence_exit_s`, but never less than ten of its longest steps. Seen twice, a second apart: if it was
    this process that was stopped for a while, what the engine said meanwhile is read in between.
    """
    limit = service.config.engine_silence_exit_s
    times_seen = 0
    while times_seen < 2:
        await asyncio.sleep(SILENCE_CHECK_S)
        client = service.client
        is_silent = limit > 0 and client.silence_s > max(limit, LONGEST_STEPS * client.stats.longest_step_s)
        times_seen = times_seen + 1 if is_silent else 0
    return f"it has said nothing for {service.client.silence_s:.0f} s"


async def _report_death(service: Service, how: str) -> None:
    """End every stream with an error and answer 503 for a while, so that clients and probes see what happened."""
    log.error("the engine is dead (%s); the server will exit", how)
    service.client.declare_dead(f"the engine is dead ({how})")
    await asyncio.sleep(service.config.engine_death_grace_s)


async def _drain(service: Service) -> None:
    """Take nothing new, let what runs finish for a while, and end the rest with an error event."""
    service.is_draining = True
    await service.lifecycle.inspection.verifier.close()
    deadline = time.monotonic() + service.config.drain_s
    while service.client.num_requests and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    if service.client.num_requests:
        log.warning("%d requests did not finish in %.0f s", service.client.num_requests, service.config.drain_s)
        service.client.end_streams(ShuttingDown())
