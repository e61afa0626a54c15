"""`heddle serve`: from arguments to a running server."""

import argparse
import asyncio
import logging
import os
from pathlib import Path
from typing import get_args

from adapters_store.manifest import ReasoningFormat, ToolFormat
from server.config import EngineConfig, LinearForm, Overlap, ServerConfig
from server.errors import ConfigError

DEMO = Path(__file__).resolve().parents[2] / "demo"


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a base model and its adapters",
        description="Serve a base model and its adapters. Without MODEL_DIR, the demo that comes with the source.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    serve.set_defaults(run=run)
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
    served.add_argument("--tool-format", choices=get_args(ToolFormat),
                        help="how the base writes calls of tools, if its chat template does not show it")  # fmt: skip
    served.add_argument("--reasoning-format", choices=get_args(ReasoningFormat),
                        help="how the base keeps its reasoning apart, if its chat template does not show it; none: it "
                        "is content")  # fmt: skip
    served.add_argument("--ignore-key", metavar="KEY", action="append", default=[],
                        help="an unknown key of configurations below --adapters that may be passed over "
                        "(repeatable)")  # fmt: skip
    served.add_argument("--store", metavar="DIR",
                        help="where registered adapters are kept (a directory for this base among the "
                        "user's data)")  # fmt: skip
    served.add_argument("--max-adapters", type=int, default=100_000, metavar="N", help="adapters registered at once")
    served.add_argument("--allow-source", metavar="SOURCE:PATTERN", action="append", default=[],
                        help="where adapters may be fetched from, such as hub:my-org/* (repeatable; none)")  # fmt: skip
    served.add_argument("--max-upload-bytes", type=int, default=0, metavar="N",
                        help="of one adapter that is sent or fetched; 0: twice --adapter-bytes")  # fmt: skip
    served.add_argument("--verify-bound", type=float, metavar="X",
                        help="how far logits may be from those of merged weights where \"verify\" is asked for, as a "
                        "part of the largest logit (2e-3 in float32, 0.25 in bfloat16)")  # fmt: skip
    served.add_argument("--verify-timeout-s", type=float, default=60.0, metavar="S",
                        help="seconds that verifying one adapter may take, with reading every byte")  # fmt: skip
    served.add_argument("--metrics-adapters", type=int, default=50, metavar="K",
                        help="adapters that have series of their own in /metrics, those that are asked for most; "
                        "the others are summed as `other`")  # fmt: skip
    served.add_argument("--max-grammar-bytes", type=int, default=256 << 10, metavar="N",
                        help="of one schema or grammar that an answer shall follow")  # fmt: skip
    served.add_argument("--grammar-timeout-s", type=float, default=1.0, metavar="S",
                        help="seconds that compiling one may take")  # fmt: skip
    http = serve.add_argument_group("where")
    http.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on")
    http.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen on")
    http.add_argument("--cors-origin", metavar="ORIGIN", action="append", default=[],
                      help="whose pages may ask from a browser, such as https://chat.example (repeatable), or *; "
                      "they may then do whatever this API can do")  # fmt: skip
    http.add_argument("--drain-s", type=float, default=5.0, metavar="S",
                      help="seconds in which running requests may finish after Ctrl-C or SIGTERM")  # fmt: skip
    http.add_argument("--keep-alive-s", type=float, default=15.0, metavar="S",
                      help="a stream in which nothing comes for so long is sent a comment, so that no proxy ends "
                      "it")  # fmt: skip
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
    engine.add_argument("--linear-form", choices=get_args(LinearForm), default="auto",
                        help="that matrices are kept in on a CPU; auto: the fastest, measured once on each "
                        "machine (heddle doctor shows it)")  # fmt: skip
    engine.add_argument("--overlap", choices=get_args(Overlap), default="auto",
                        help="launch a step before the tokens of the one before are known; auto: on a GPU")  # fmt: skip
    engine.add_argument("--no-self-check", action="store_true",
                        help="serve without having compared some tokens with Transformers' own forward, or whatever "
                        "came of it")  # fmt: skip
    for name, text in _NUMBERS.items():
        engine.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name), metavar="N", help=text
        )


def run(options: argparse.Namespace) -> int:
    # half a second of imports, which the other commands do without
    from server import front
    from server.commands.announcer import Announcer, console

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    announcer = Announcer(console(), is_demo=options.model_dir is None)
    return asyncio.run(front.serve(config_of(options), announcer.reports()))


def demo_base() -> Path:
    """Raises ConfigError outside of a checkout."""
    if not (DEMO / "base").is_dir():
        raise ConfigError("MODEL_DIR is missing, and the demo is only in the source checkout")
    return DEMO / "base"


# fields of EngineConfig that the command line sets
_NUMBERS = {
    "threads": "threads of the engine; 0: the machine's cores",
    "max_model_len": "longest sequence in tokens; 0: the model's own limit",
    "memory_budget": "bytes that keys and values and adapters share; 0: kv_cache_bytes and adapter_bytes together, "
    "where they are set; else half of what is free, at most 8 GiB, or what is left of a GPU",
    "kv_reserve": "of it, bytes that adapters never take; 0: a quarter, or one context where that is more; at most "
    "half",
    "kv_cache_bytes": "the most that keys and values take of it; 0: no limit of their own",
    "tokens_per_step": "token budget of one step",
    "target_inter_token_ms": "while some decode, prompts get so much of a step that it takes about so long, or "
    "2.5 times as long as without them where that is more; 0: all of it; -1: 50 on a CPU, 0 on a GPU",
    "max_running": "requests decoded together",
    "adapter_bytes": "the most that adapters take of it; 0: no limit of their own",
    "adapter_slots": "adapters in memory at once; 0: as many as bytes allow",
    "host_cache_bytes": "files of adapters that are kept in the host's memory when they leave the device; 0: none; "
    "-1: none on a CPU; beside a GPU an eighth of what is free, at most 16 GiB",
    "max_rank": "highest LoRA rank that decodes are captured for on a GPU; higher ones run without a graph; 0: all do",
    "max_experts_per_adapter": "experts that an ESFT adapter may tune in one layer; 0: all",
}


def config_of(options: argparse.Namespace) -> ServerConfig:
    model_dir, adapters, name = options.model_dir, options.adapters, options.model_name
    if model_dir is None:
        model_dir = str(demo_base())
        adapters, name = adapters or str(DEMO / "adapters"), name or "heddle-demo"
    numbers = {field: getattr(options, field) for field in _NUMBERS}
    engine = EngineConfig(
        model_dir=model_dir,
        device=options.device,
        dtype=options.dtype,
        linear_form=options.linear_form,
        overlap=options.overlap,
        self_check=not options.no_self_check,
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
        tool_format=options.tool_format,
        reasoning_format=options.reasoning_format,
        ignore_keys=tuple(options.ignore_key),
        store=options.store,
        max_adapters=options.max_adapters,
        metrics_adapters=options.metrics_adapters,
        allow_sources=tuple(options.allow_source),
        max_upload_bytes=options.max_upload_bytes,
        verify_timeout_s=options.verify_timeout_s,
        max_grammar_bytes=options.max_grammar_bytes,
        grammar_timeout_s=options.grammar_timeout_s,
        verify_bound=options.verify_bound,
        host=options.host,
        port=options.port,
        cors_origins=tuple(options.cors_origin),
        drain_s=options.drain_s,
        keep_alive_s=options.keep_alive_s,
        engine_silence_s=options.engine_silence_s,
        engine_silence_exit_s=options.engine_silence_exit_s,
    )
