# Two commands matter: `make serve` and `make test`. Both work from a fresh clone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export HF_HUB_OFFLINE = 1

.PHONY: serve test unit thorough lint simulate schemathesis census families json-schema-suite catalogue clients bench bench-front bench-against bench-peers bench-adapters structured wheel clean

serve: $(INSTALLED)  ## serve the demo, or: make serve ARGS="MODEL_DIR --adapters DIR"
	$(BIN)/heddle serve $(ARGS)

test: $(INSTALLED) lint  ## everything: style, types, unit and whole-system tests
	$(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m "not alone and not thorough"
	$(BIN)/pytest -m "alone and not thorough" $$(grep -rl mark.alone --include="test_*.py" tests)

unit: $(INSTALLED)  ## the fast part, under a minute
	$(BIN)/pytest -m "not slow"

thorough: $(INSTALLED)  ## what `make test` leaves out: the same promises for more families, minutes
	$(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m thorough

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

simulate: $(INSTALLED)  ## a million steps of the engine without a model, a million with one in flight, and another of it over memory where loads fail
	$(BIN)/python -m tests.engine.test_simulation --steps 1000000
	$(BIN)/python -m tests.engine.test_simulation --steps 1000000 --overlaps
	$(BIN)/python -m tests.weights.test_residency_simulation --steps 1000000

schemathesis: $(INSTALLED)  ## thousands of requests made from /openapi.json: does the server do what it says?
	$(BIN)/python -m tests.support.schema_run $(ARGS)

census: $(INSTALLED)  ## which adapters are served exactly, refused or served wrongly; rewrites docs/adapters.md
	$(BIN)/python -m tests.census

families: $(INSTALLED)  ## every family with adapters on all that takes them, against Transformers; rewrites docs/models.md
	$(BIN)/python -m tests.families $(ARGS)

json-schema-suite: $(INSTALLED)  ## which schemas are followed exactly, and which are refused; rewrites docs/structured-output.md
	$(BIN)/python -m tests.schema_suite $(ARGS)

catalogue: $(INSTALLED)  ## ten thousand adapters, hundreds of kill -9; rewrites benchmarks/results/catalogue.md
	$(BIN)/python -m benchmarks.catalogue --write

clients: $(INSTALLED)  ## the clients that people use, from their registries, against the demo; rewrites README's table
	$(BIN)/python -m clients --write

bench: $(INSTALLED)  ## throughput beside Transformers and PEFT; rewrites README's table
	$(BIN)/python -m benchmarks.throughput

bench-front: $(INSTALLED)  ## CPU time of the front process a streamed token; rewrites benchmarks/results/front.md
	$(BIN)/python -m benchmarks.front --write

bench-against: $(INSTALLED)  ## is this checkout slower than a commit? make bench-against REF=main~3
	$(BIN)/python -m benchmarks.against $(or $(REF),$(error REF=... is missing: the commit to compare with))

bench-peers: $(INSTALLED)  ## beside vLLM, OpenVINO, llama.cpp, Transformers, which it installs; writes a page into benchmarks/results/
	$(BIN)/python -m benchmarks.peers $(ARGS)

bench-adapters: $(INSTALLED)  ## adapters that come and go: neighbours, bytes, time to first token; a page in benchmarks/results/
	$(BIN)/python -m benchmarks.adapters $(ARGS)

structured: $(INSTALLED)  ## are all answers under random schemas valid, and what do masks cost? rewrites benchmarks/results/structured.md
	$(BIN)/python -m benchmarks.structured --write

wheel: $(INSTALLED)  ## dist/*.whl with compiled kernels, for machines of this kind that have no compiler
	rm -rf build
	HEDDLE_PREBUILT=1 $(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info build dist
