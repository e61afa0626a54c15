"""Who may import whom (docs/architecture.md). Read off the source, so it holds for imports inside functions too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("adapters_store", "kernels", "server", "demo", "benchmarks", "clients", "tests")
# a folder or file -> prefixes of ours that it may import; the longest matching key counts
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": ("kernels",),
    "adapters_store": ("adapters_store",),
    "server/errors.py": ("adapters_store.errors",),
    "server/config.py": ("server.errors",),
    "server/version.py": (),
    "server/kernels_name.py": ("server.errors",),
    "server/memory.py": (),
    "server/token_bytes.py": (),
    "server/grammars": ("server.grammars", "server.errors", "server.engine.masks", "server.token_bytes",
                        "adapters_store.worker", "adapters_store.worker_process"),
    "server/cpu.py": (),
    "server/metrics": ("server.metrics", "server.engine.client", "server.engine.messages", "server.engine.request",
                       "server.config", "adapters_store.catalog", "adapters_store.ref"),
    "server/engine": ("server.engine", "server.errors", "server.config", "adapters_store.ref", "adapters_store.parts",
                      "adapters_store.base_spec"),
    "server/weights": ("server.weights", "adapters_store", "kernels", "server.engine.residency",
                       "server.engine.messages", "server.engine.request", "server.engine.block_memory"),
    "server/model": ("server.model", "kernels", "server.kernels_name", "server.cpu", "server.engine.plan",
                     "server.engine.masks",
                     "server.engine.request", "server.engine.checks", "adapters_store.ref"),
    "server/api": ("server.api", "server.engine.client", "server.engine.messages", "server.engine.request",
                   "adapters_store", "server.errors", "server.config", "server.lifecycle", "server.metrics",
                   "server.version", "server.grammars.compiler", "server.grammars.source"),
    "server/api/texts": ("server.api.texts", "server.errors", "server.token_bytes", "adapters_store.errors"),
    "server/api/transport": ("server.api.transport", "server.api.protocol", "server.api.routes", "server.api.service",
                             "adapters_store", "server.errors"),
    "server/api/protocol": ("server.api.protocol", "server.api.protocol.wanted", "server.engine.request",
                            "server.api.texts.speech", "server.grammars.limits", "server.grammars.source",
                            "adapters_store", "server.lifecycle", "server.errors"),
    "server/device.py": ("server.config", "server.errors", "server.memory"),
    "server/memory_plan.py": ("server.config", "server.errors"),
    "server/device_memory.py": ("server.config", "server.device", "server.errors", "server.memory_plan",
                                "server.engine.kv_cache", "server.model", "server.weights"),
    "server/assembly.py": ("server.engine", "server.model", "server.weights", "server.config", "server.device",
                           "server.device_memory", "adapters_store.base_spec", "kernels.compiled",
                           "kernels.adapter_rows", "kernels.host"),
    "server/engine_process.py": ("server.assembly", "server.engine", "server.grammars.mask_maker",
                                 "server.model", "server.weights.arena", "server.config", "server.errors",
                                 "server.device", "kernels.host"),
    "server/engine_child.py": ("server.engine", "server.config", "server.errors"),
    "server/listener.py": ("server.errors",),
    "server/front.py": ("server", "adapters_store"),
    "server/exits.py": ("server.errors", "adapters_store.errors"),
    "server/lifecycle": ("server.lifecycle", "server.engine.messages", "server.engine.request", "server.errors",
                         "adapters_store"),
    "server/run_directory.py": ("server.errors", "adapters_store.errors", "adapters_store.store.store"),
    "server/storage.py": ("adapters_store", "server.config", "server.errors", "server.run_directory",
                          "server.lifecycle.terms"),
    "server/commands": ("server.commands", "server.config", "server.errors", "server.exits", "server.storage",
                        "adapters_store"),
    "server/commands/doctor.py": ("server.commands", "server.diagnosis", "server.engine_child", "server.kernels_name",
                                  "server.errors", "adapters_store.errors"),
    "server/diagnosis.py": ("server.engine_process", "server.model", "server.config", "server.cpu", "server.memory",
                            "server.errors", "server.version", "server.device", "kernels"),
    "server/commands/serve.py": ("server.commands", "server.config", "server.errors", "server.front",
                                 "adapters_store.manifest"),
    "server/commands/announcer.py": ("server.front", "server.api", "server.engine.messages", "server.version",
                                     "adapters_store"),
    "server/commands/offline.py": ("server.commands.work", "server.exits", "server.storage", "server.lifecycle",
                                   "server.api.texts.text", "adapters_store"),
    "server/cli.py": ("server.commands", "server.exits", "server.version", "adapters_store.errors"),
    "server/__main__.py": ("server.cli",),
    "server/__init__.py": (),
    "demo": ("demo",),
}  # fmt: skip
# a folder -> third-party packages that it must not import
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "adapters_store": ("torch", "transformers", "fastapi", "pydantic"),
    "server/engine": ("torch", "transformers", "fastapi", "pydantic", "starlette"),
    "server/api": ("torch", "transformers"),
    "server/lifecycle": ("torch", "transformers", "fastapi", "pydantic", "starlette"),
    "server/model": ("fastapi", "pydantic", "starlette", "zmq"),
    "server/weights": ("fastapi", "pydantic", "starlette", "zmq"),
    "server/assembly.py": ("fastapi", "pydantic", "starlette"),
    "server/device_memory.py": ("fastapi", "pydantic", "starlette"),
    "server/engine_process.py": ("fastapi", "pydantic", "starlette"),
}
NOBODY_IMPORTS = ("server.api", "server.cli", "server.engine_process", "server.front", "server.assembly")
SOURCES = sorted(
    file for folder in ("kernels", "adapters_store", "server", "demo") for file in (ROOT / folder).rglob("*.py")
)


TESTS = sorted((ROOT / "tests").rglob("*.py"))
# what tests share, and tools of theirs; no test is in them
BESIDE_THE_TREE = ("tests/support", "tests/census", "tests/families", "tests/schema_suite")


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imports_of(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rule_for(file: Path, rules: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    path = relative(file)
    keys = [key for key in rules if path == key or path.startswith(f"{key}/")]
    return rules[max(keys, key=len)] if keys else None


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


@pytest.mark.parametrize("file", SOURCES, ids=relative)
def test_imports(file: Path) -> None:
    allowed = rule_for(file, ALLOWED)
    assert allowed is not None, "a new place needs a rule"
    for name in imports_of(file):
        if name.split(".")[0] in OURS:
            assert within(name, allowed), f"{name} may not be imported here"
        for package in rule_for(file, FORBIDDEN) or ():
            assert not within(name, (package,)), f"{package} may not be imported here"


def test_composition_roots_are_imported_by_nobody_below() -> None:
    exempt = {
        "server/front.py": ("server.api",),
        "server/__main__.py": ("server.cli",),
        "server/engine_process.py": ("server.assembly",),
        "server/commands/serve.py": ("server.front",),
        "server/diagnosis.py": ("server.engine_process",),
        "server/commands/announcer.py": ("server.front", "server.api"),
        "server/commands/offline.py": ("server.api.texts.text",),
    }
    for file in SOURCES:
        path = relative(file)
        for name in imports_of(file):
            if within(name, NOBODY_IMPORTS) and not path.startswith("server/api/"):
                assert within(name, exempt.get(path, ())), f"{path} imports {name}"


def test_triton_only_in_kernel_files() -> None:
    for file in SOURCES:
        if any(within(name, ("triton",)) for name in imports_of(file)):
            assert file.name == "kernel.py", file


def test_the_grammars_library_only_in_processes_that_can_be_killed() -> None:
    """Neither the front nor the engine may wait for what a stranger's grammar makes of it."""
    room = ROOT / "server" / "grammars"
    inside = {file for file in SOURCES if any(within(name, ("llguidance",)) for name in imports_of(file))}
    assert inside and all(file.parent == room for file in inside)
    outside = [room / "compiler.py", room / "mask_maker.py"]  # what the front and the engine import
    while outside:
        file = outside.pop()
        assert file not in inside, f"{relative(file)} is imported by the front or the engine"
        named = {name for name in imports_of(file) if within(name, ("server.grammars",))}
        outside += [it for it in room.glob("*.py") if within_any(f"server.grammars.{it.stem}", named)]


def within_any(module: str, names: set[str]) -> bool:
    return any(within(name, (module,)) for name in names)


def test_cuda_bindings_only_in_the_driver_file() -> None:
    for file in SOURCES:
        if any(within(name, ("cuda",)) for name in imports_of(file)):
            assert file == ROOT / "server" / "weights" / "cuda_driver.py"


def test_the_kernels_package_is_empty_at_its_top() -> None:
    """Transformers may import a package of this name while it imports model code (server/kernels_name.py)."""
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""


def test_no_test_module_is_imported() -> None:
    """What several tests need lies in tests/support, so that a test can be read, moved and deleted alone."""
    imported = {
        f"{relative(file)} imports {name}"
        for file in (*TESTS, *(ROOT / "benchmarks").rglob("*.py"))
        for name in imports_of(file)
        if name.startswith("tests.") and ".test_" in name
    }
    assert imported == set()


def test_folders_of_tests_mirror_the_tree() -> None:
    """tests/kernels tests kernels/, tests/engine tests server/engine/: where a file's tests are needs no search."""
    for folder in {file.parent for file in TESTS} - {ROOT / "tests"}:
        below = folder.relative_to(ROOT / "tests")
        is_mirror = (ROOT / below).is_dir() or (ROOT / "server" / below).is_dir()
        is_beside = relative(folder) in BESIDE_THE_TREE
        assert is_mirror != is_beside, f"{relative(folder)} tests no folder of that name"
        holds_tests = any(folder.glob("test_*.py"))
        assert holds_tests != is_beside, f"{relative(folder)} is no place for tests, or has none"
