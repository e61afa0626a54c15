"""The command line: `heddle serve`. The only place that reads arguments."""

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from adapters_store.catalog import CatalogEntry
from adapters_store.errors import AdapterError, clean
from server import front
from server.api.adapters import warnings_for
from server.api.service import Service
from server.config import EngineConfig, ServerConfig
from server.engine import messages
from server.errors import ConfigError, HeddleError
from server.version import VERSION

DEMO = Path(__file__).resolve().parent.parent / "demo"
LOG_WIDTH = 200  # columns, where the console is a file or a journal
EXIT_CONFIG = 78  # EX_CONFIG: a supervisor need not try again
DEMO_QUESTION = ("roman", "How would Caesar write 1989?")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else LOG_WIDTH)
    try:
        return asyncio.run(front.serve(_config(options), _Announcer(console, options.model_dir is None).reports()))
    except HeddleError as error:
        console.print("[bold red]heddle:[/]", Text(clean(error.message)), soft_wrap=True)
        return EXIT_CONFIG if isinstance(error, ConfigError) else front.EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heddle",
        description="One frozen base model, many LoRA and ESFT adapters decoded in the same batch, over OpenAI's API.",
    )
    parser.add_argument("--version", action="version", version=f"heddle {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a base model and its adapters",
        description="Serve a base model and its adapters. Without MODEL_DIR, the demo that comes with the source.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    serve.add_argument("model_dir", nargs="?", metavar="MODEL_DIR", help="a Transformers causal language model")
    served = serve.add_argument_group("what is served")
    served.add_argument("--adapters", metavar="DIR", help="one adapter a sub-directory: PEFT LoRA or ESFT")
    served.add_argument("--adapter-root", metavar="DIR", action="append", default=[],
                        help="a directory that POST /v1/adapters may read, beside --adapters (repeatable)")  # fmt: skip
    served.add_argument("--model-name", metavar="NAME", help="what requests call the base (the directory's name)")
    served.add_argument("--base-name", metavar="NAME", action="append", default=[],
                        help="what the base is known as beside its directory's name and its configuration's: adapters "
                        "that say they were trained on another get a warning (repeatable)")  # fmt: skip
    served.add_argument("--strict-base", action="store_true", help="refuse those adapters")
    served.add_argument("--ignore-key", metavar="KEY", action="append", default=[],
                        help="an unknown key of configurations below --adapters that may be passed over "
                        "(repeatable)")  # fmt: skip
    served.add_argument("--verify-timeout-s", type=float, default=60.0, metavar="S",
                        help="seconds that verifying one adapter may take, with reading every byte")  # fmt: skip
    http = serve.add_argument_group("where")
    http.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on")
    http.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on")
    http.add_argument("--drain-s", type=float, default=5.0, metavar="S",
                      help="seconds in which running requests may finish after Ctrl-C or SIGTERM")  # fmt: skip
    http.add_argument("--engine-silence-s", type=float, default=30.0, metavar="S",
                      help="new work is refused when the engine has said nothing for so long; see /health")  # fmt: skip
    http.add_argument("--engine-silence-exit-s", type=float, default=300.0, metavar="S",
                      help="the server exits (status 70) when it has said nothing for so long; 0: never")  # fmt: skip
    engine, defaults = serve.add_argument_group("engine"), EngineConfig(model_dir="")
    engine.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute; auto: a GPU if there is one",
    )
    engine.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="of weights and cache; auto is float32 on a CPU")  # fmt: skip
    for name, text in _NUMBERS.items():
        engine.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name), metavar="N", help=text
        )
    return parser


# fields of EngineConfig that the command line sets
_NUMBERS = {
    "threads": "threads of the engine; 0: the machine's cores",
    "max_model_len": "longest sequence in tokens; 0: the model's own limit",
    "kv_cache_bytes": "memory for keys and values; 0: a quarter of what is free, at most 4 GiB",
    "tokens_per_step": "token budget of one step",
    "max_running": "requests decoded together",
    "adapter_bytes": "memory for adapters",
    "adapter_slots": "adapters in memory at once",
    "max_rank": "highest LoRA rank that decodes are captured for on a GPU; higher ones run without a graph; 0: all do",
    "max_experts_per_adapter": "experts that an ESFT adapter may tune in one layer; 0: all",
}


def _config(options: argparse.Namespace) -> ServerConfig:
    model_dir, adapters, name = options.model_dir, options.adapters, options.model_name
    if model_dir is None:
        if not (DEMO / "base").is_dir():
            raise ConfigError("MODEL_DIR is missing, and the demo is only in the source checkout")
        model_dir = str(DEMO / "base")
        adapters, name = adapters or str(DEMO / "adapters"), name or "heddle-demo"
    numbers = {field: getattr(options, field) for field in _NUMBERS}
    engine = EngineConfig(
        model_dir=model_dir,
        device=options.device,
        dtype=options.dtype,
        trace_steps=os.environ.get("HEDDLE_TRACE_STEPS") or None,
        **numbers,
    )
    return ServerConfig(
        engine=engine,
        adapters_dir=adapters,
        adapter_roots=tuple(options.adapter_root),
        model_name=name,
        base_names=tuple(options.base_name),
        strict_base=options.strict_base,
        ignore_keys=tuple(options.ignore_key),
        verify_timeout_s=options.verify_timeout_s,
        host=options.host,
        port=options.port,
        drain_s=options.drain_s,
        engine_silence_s=options.engine_silence_s,
        engine_silence_exit_s=options.engine_silence_exit_s,
    )


class _Announcer:
    """Tells the console how the start goes, and in the end what is served and how to try it."""

    def __init__(self, console: Console, is_demo: bool) -> None:
        self._console = console
        self._is_demo = is_demo
        self._bar = Progress(
            TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self._stages: dict[str, TaskID] = {}
        self._adapters: list[tuple[str, CatalogEntry | AdapterError]] = []

    def reports(self) -> front.Reports:
        return front.Reports(self._progress, self._adapter, self._ready)

    def _progress(self, progress: messages.Progress) -> None:
        if not self._stages:
            self._bar.start()
        if progress.stage not in self._stages:
            self._stages[progress.stage] = self._bar.add_task(progress.stage, total=progress.total)
        self._bar.update(self._stages[progress.stage], completed=progress.done)

    def _adapter(self, name: str, outcome: CatalogEntry | AdapterError) -> None:
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
                size = f"{outcome.package.file_bytes / 1e6:,.2f} MB"
                table.add_row(Text(name), outcome.ref.kind, size, Text(_remarks(outcome, service)))
        self._console.print(table)
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


def _remarks(entry: CatalogEntry, service: Service) -> str:
    """Which base it says it was trained on, and what is odd about that."""
    declared = entry.package.declared_base
    return " ".join(warnings_for(entry, service)) or (f"trained on {declared}" if declared else "")


if __name__ == "__main__":
    sys.exit(main())
