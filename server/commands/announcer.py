"""What the console says while a server starts."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from adapters_store.catalog import Found
from adapters_store.errors import AdapterError, clean
from server import front
from server.api.service import Service
from server.engine import messages
from server.version import VERSION

LOG_WIDTH = 200  # columns, where the console is a file or a journal
DEMO_QUESTION = ("roman", "How would Caesar write 1989?")


def console() -> Console:
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else LOG_WIDTH)


class Announcer:
    """Tells the console how the start goes, and in the end what is served and how to try it."""

    def __init__(self, console: Console, is_demo: bool) -> None:
        self._console = console
        self._is_demo = is_demo
        self._bar = Progress(
            TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self._stages: dict[str, TaskID] = {}
        self._adapters: list[tuple[str, Found | AdapterError]] = []

    def reports(self) -> front.Reports:
        return front.Reports(self._progress, self._adapter, self._ready)

    def _progress(self, progress: messages.Progress) -> None:
        if not self._stages:
            self._bar.start()
        if progress.stage not in self._stages:
            self._stages[progress.stage] = self._bar.add_task(progress.stage, total=progress.total)
        self._bar.update(self._stages[progress.stage], completed=progress.done)

    def _adapter(self, name: str, outcome: Found | AdapterError) -> None:
        self._adapters.append((name, outcome))

    def _ready(self, service: Service, url: str) -> None:
        if self._stages:
            self._bar.stop()
        info, base = service.info, service.catalog.base_name
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("model", "kind", "size", ""):
            table.add_column(column)
        size = f"{info.num_parameters / 1e6:,.1f} M parameters, {info.dtype}"
        room = f"{info.kv_cache_tokens:,} tokens of KV cache, {info.max_model_len:,} a request"
        table.add_row(Text(clean(base)), f"base ({info.model_type})", size, room)
        for name, outcome in self._adapters:
            if isinstance(outcome, AdapterError):
                table.add_row(Text(clean(name)), "[red]refused[/]", "", Text(str(outcome)))
            else:
                size = f"{outcome.weights.num_bytes / 1e6:,.2f} MB"
                table.add_row(Text(name), outcome.weights.kind, size, Text(_remarks(outcome, service)))
        self._console.print(table)
        others = len(service.catalog) - sum(not isinstance(outcome, AdapterError) for _, outcome in self._adapters)
        if others:
            place = service.lifecycle.registry.store.directory
            self._console.print(f"and {others:,} registered before ({clean(str(place))})", markup=False, soft_wrap=True)
        self._console.print(f"\n[bold]Heddle {VERSION}[/] listens on [bold]{url}[/]  (Ctrl-C to stop). Try:\n")
        self._console.print(self._curl(url, service), soft_wrap=True, markup=False)

    def _curl(self, url: str, service: Service) -> str:
        served = [name for name, outcome in self._adapters if not isinstance(outcome, AdapterError)]
        model, question = (served[0] if served else service.catalog.base_name), "Hello"
        if self._is_demo and DEMO_QUESTION[0] in served:
            model, question = DEMO_QUESTION
        if service.text.has_chat_template:
            route, prompt = "chat/completions", f'"messages": [{{"role": "user", "content": "{question}"}}]'
        else:
            route, prompt = "completions", f'"prompt": "{question}"'
        body = f'{{"model": "{model}", {prompt}, "temperature": 0, "max_tokens": 64}}'
        return f"curl {url}/{route} -H 'Content-Type: application/json' -d '{body}'"


def _remarks(found: Found, service: Service) -> str:
    """Which base it says it was trained on, and what is odd about that."""
    declared = found.version.declared_base
    return " ".join(service.lifecycle.inspection.warnings_for(found)) or (f"trained on {declared}" if declared else "")
