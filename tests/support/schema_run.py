"""Requests that schemathesis makes out of a server's own /openapi.json, and what was wrong with the answers.

All of its phases (examples, coverage, fuzzing, stateful) and all of its checks, with four differences:

- `not_a_server_error` is replaced by a stricter one: every 5xx is a failure, but a 504 where the request itself asked
  for a `timeout` (and those of a few milliseconds are tried).
- `positive_data_acceptance` is replaced by one that also knows refusals which no schema can foretell, one by one
  (FORETOLD_BY_NO_SCHEMA): they depend on what is registered, on several fields together, or on the model's tokens. And
  1.0 is an integer for JSON Schema and none for this server: sound requests say 1.
- where the document says that any text will do, most requests would ask for a model or a directory that is not there.
  `aimed` names some that are, beside others. It also leaves out of the document what schemathesis cannot build.
- two findings of its that are none are passed over (_is_mistaken).

No operation, no method and no field is left out.
"""

import argparse
import copy
import json
import random
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema

from tests.support.live_server import LiveServer, write_tokenizer
from tests.support.served import VOCAB, settle, tiny
from tests.support.tiny_adapters import save_esft, save_lora
from tests.support.tiny_models import save_model

CONTEXT = 48
MOST_RULES = 4  # between the fields of chat: schemathesis finds no requests that keep to five
TEMPLATE = (
    "{% if tools %}{{ tools | map(attribute='function.name') | join }}\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ message.reasoning_content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ {'name': call.function.name, 'arguments': "
    "call.function.arguments} | tojson }}\n</tool_call>{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_AIMED = ("Body", "Source", "Target", "FunctionCall", "CallItem", "Outputs")
PHASES = ("examples", "coverage", "fuzzing", "stateful")


def make_server(directory: Path) -> LiveServer:
    """With a context so short that each request is answered in milliseconds. Started, and not yet ready."""
    write_tokenizer(save_model(directory / "tiny", "qwen3_moe", vocab_size=VOCAB))
    (directory / "tiny" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    save_lora(directory / "adapters" / "lora", tiny(), 1, ("q_proj", "v_proj"))
    save_esft(directory / "adapters" / "esft", tiny(), 2, {1: [2, 0], 3: [5]})
    for number, name in enumerate(("one", "two")):
        save_lora(directory / "more" / name, tiny(), 3 + number, ("o_proj",))
    return LiveServer(
        str(directory / "tiny"), "--adapters", str(directory / "adapters"), "--adapter-root", str(directory / "more"),
        "--max-model-len", str(CONTEXT), log=directory / "log",
    )  # fmt: skip


def aimed(document: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The document, with models and directories that are there (and some that are not) where it takes any text, and
    without texts and token ids that no schema tells from those that are served."""
    told = copy.deepcopy(document)
    paths = [str(directory / "more" / name) for name in ("one", "two", "none")]
    narrow: dict[str, Any] = {
        "model": {"enum": ["tiny", "lora", "esft", "none"]},
        "path": {"enum": paths},
        "lora_path": {"enum": paths},
        "uri": {"enum": [f"file://{path}" for path in paths]},
        "logit_bias": {"propertyNames": {"pattern": "^[0-9]{1,2}$"}},
        "arguments": {"enum": ["{}", '{"a": [1]}', ""]},
        "regex": {"enum": ["[a-z]+", "a|b", "("]},
        "grammar": {"enum": ['root ::= "a" | "b"', 'start: "a"', "?"]},
        "guided_regex": {"enum": ["[a-z]+", "a|b", "("]},
        "guided_grammar": {"enum": ['root ::= "a" | "b"', 'start: "a"', "?"]},
    }
    for name, schema in told["components"]["schemas"].items():
        for field_name, it in schema.get("properties", {}).items():
            if field_name in narrow and name.endswith(_AIMED):
                _narrow(it, narrow[field_name])
    del told["components"]["schemas"]["ChatBody"]["allOf"][MOST_RULES:]
    for name, field_name in (("CompletionBody", "prompt"), ("EmbeddingBody", "input")):
        _narrow(told["components"]["schemas"][name]["properties"][field_name], {"minLength": 1})
    for operations in told["paths"].values():
        for parameter in (it for operation in operations.values() for it in operation["parameters"]):
            if parameter["name"] == "Upload-Offset":
                parameter["schema"] = {"enum": ["0", "1"]}
    return told


def _narrow(schema: dict[str, Any], more: dict[str, Any]) -> None:
    for it in (schema, schema.get("items"), *schema.get("anyOf", ())):
        if isinstance(it, dict) and it.get("type") in ("string", "object"):
            it |= more
        elif it is not schema and isinstance(it, dict):
            _narrow(it, more)


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    if case.meta is not None and case.meta.generation.mode.is_positive:
        case.body = _whole(case.body)


def _whole(it: Any) -> Any:
    if isinstance(it, dict):
        return {key: _whole(value) for key, value in it.items()}
    if isinstance(it, list):
        return [_whole(value) for value in it]
    return int(it) if isinstance(it, float) and it.is_integer() else it


# -- what may be answered ---

# (route, what its refusal says): refusals of requests that are as the schema says
FORETOLD_BY_NO_SCHEMA = {
    # what is registered, and what lies where
    r"POST /(un)?load_lora_adapter": "",  # SGLang's routes answer 400 whatever the reason
    r"POST /v1/(un)?load_lora_adapter": "",  # and vLLM's, but for 404
    r"(POST|PUT) /v1/(adapters|loras).*": r"is not a directory|files.*is not a file of an adapter|outside|is a pickle|"
    r"the place|source|the path names .* and the body|the manifest|of the form|the form|name: Field required",
    r"PUT /v1/aliases/.*": r"target|the path names .* and the body",
    # several fields together, and how many tokens a text has
    r".*": r"context_length_exceeded|maximum context length",
    # what an answer must spell, which is a language of its own
    r"POST /v1/(completions|chat/completions|responses.*|messages.*)": r"unsupported_grammar|invalid_grammar|"
    r"each bring a grammar|ignore_eos is for answers|of the tools|no tools to call|two tools have",
    r"POST /v1/completions": r"best_of is|min_tokens is|the prompt has|prompts together have|of up to .* tokens in one|"
    r"completions in one request|logit_bias has the key|log-probabilities of prompts",
    r"POST /v1/chat/completions": r"min_tokens is|the prompt has|of up to .* tokens in one|"
    r"logit_bias has the key|log-probabilities of prompts|chat template does not read|parts of content|"
    r"continue_final_message|is answered|two calls in one turn|the result of the call|"
    r"chat template does not write",
    r"POST /v1/responses(/input_tokens)?": r"min_tokens is|the prompt has|of up to .* tokens in one|"
    r"prompts together have|logit_bias has the key|chat template does not (read|write)|is answered|two calls in one "
    r"turn|the text in",
    r"POST /v1/messages.*": r"the prompt has|of up to .* tokens in one|chat template|is answered|two calls in one turn|"
    r"the last turn calls tools|tool_result blocks come before|budgets of thinking|"
    r"structured output is not served",
    r"POST /v1/embeddings": r"the prompt has|prompts together have|of up to .* tokens in one",
    r"POST /tokenize": r"prompts together have|chat template does not read|continue_final_message|"
    r"two tools have the name|is answered|two calls in one turn|the result of the call|"
    r"chat template does not write|unsupported_grammar|invalid_grammar",
}


@schemathesis.check
def no_failure_of_the_servers(ctx: Any, response: Any, case: Any) -> None:
    timed_out = response.status_code == 504 and isinstance(case.body, dict) and case.body.get("timeout")
    assert response.status_code < 500 or timed_out, f"{response.status_code}: {response.text[:400]}"


@schemathesis.check
def events_are_as_told(ctx: Any, response: Any, case: Any) -> None:
    """What a check of schemathesis leaves out: what stands in `data`."""
    if not response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        return
    told = case.operation.definition.raw["responses"]["200"]["content"]["text/event-stream"]["schema"]
    schemas = {"components": case.operation.schema.raw_schema["components"]}
    chunk = jsonschema_rs.Draft202012Validator(told["properties"]["data"]["anyOf"][0]["contentSchema"] | schemas)
    data = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    chunks = [json.loads(it) for it in data if it != "[DONE]"]
    for it in chunks:
        chunk.validate(it)
    kinds = [it.get("type") for it in chunks]
    ends = ("message_stop", "error", "response.completed", "response.incomplete")
    assert data[-1] == "[DONE]" or "error" in chunks[-1] or kinds[-1] in ends, data[-1]
    assert "[DONE]" not in data[:-1] and not any(kind in ends for kind in kinds[:-1])


@schemathesis.check
def what_is_as_told_is_taken(ctx: Any, response: Any, case: Any) -> None:
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code in (404, 409, 412, 422):
        return
    if response.status_code < 400 or response.status_code in (405, 504):
        return
    routes = (says for route, says in FORETOLD_BY_NO_SCHEMA.items() if re.fullmatch(route, case.operation.label))
    assert any(re.search(says, response.text) for says in routes), f"{response.status_code}: {response.text[:400]}"


# -- runs ---


@dataclass
class Operation:
    """What became of the requests to one route."""

    by_phase: Counter[str] = field(default_factory=Counter)
    by_status: Counter[int] = field(default_factory=Counter)
    num_sound: int = 0  # as the schema says
    num_taken: int = 0  # of those: answered with a 2xx
    num_failures: int = 0


@dataclass
class Outcome:
    operations: dict[str, Operation] = field(default_factory=lambda: defaultdict(Operation))
    failures: list[str] = field(default_factory=list)

    @property
    def num_cases(self) -> int:
        return sum(sum(it.by_phase.values()) for it in self.operations.values())

    def lines(self) -> Iterator[str]:
        """A table, as Markdown has them."""
        yield "| operation | " + " | ".join(PHASES) + " | sound | taken | answers | failures |"
        yield "|---|" + "---:|" * (len(PHASES) + 2) + "---|---:|"
        for label, it in sorted(self.operations.items()):
            answers = ", ".join(f"{status}: {count}" for status, count in sorted(it.by_status.items()))
            counts = " | ".join(str(it.by_phase[phase]) for phase in PHASES)
            yield f"| `{label}` | {counts} | {it.num_sound} | {it.num_taken} | {answers} | {it.num_failures} |"
        totals = " | ".join(str(sum(it.by_phase[phase] for it in self.operations.values())) for phase in PHASES)
        yield f"| {self.num_cases} in all | {totals} | | | | {len(self.failures)} |"


def run(
    server: LiveServer, directory: Path, seed: int, examples: int, phases: Sequence[str] = PHASES, steps: int = 6,
) -> Outcome:  # fmt: skip
    """`examples` of each operation in the fuzzing phase, and as many scenarios of `steps` in the stateful one."""
    document = aimed(httpx.get(f"{server.url}/openapi.json").json(), directory)
    schema = schemathesis.openapi.from_dict(
        document, config=SchemathesisConfig.from_dict(_settings(seed, examples, phases, steps))
    )
    schema.config.update(base_url=server.url)
    outcome = Outcome()
    for event in from_schema(schema).execute():
        if isinstance(event, events.ScenarioFinished):
            _take(outcome, event)
            _delete_uploads(server, event)
        elif isinstance(event, events.NonFatalError | events.FatalError):
            outcome.failures.append(f"{getattr(event, 'label', '')}: {getattr(event, 'value', event)!r}")
    return outcome


def _settings(seed: int, examples: int, phases: Sequence[str], steps: int) -> dict[str, Any]:
    enabled: dict[str, Any] = {phase: {"enabled": phase in phases} for phase in PHASES}
    enabled["stateful"]["max-steps"] = steps
    return {
        "seed": seed,
        "continue-on-failure": True,
        "max-stream-events": 1000,
        "generation": {"max-examples": examples, "deterministic": True, "database": "none", "no-shrink": True},
        "phases": enabled,
        "checks": {"not_a_server_error": {"enabled": False}, "positive_data_acceptance": {"enabled": False}},
    }


def _delete_uploads(server: LiveServer, event: events.ScenarioFinished) -> None:
    """Those that the scenario began: only so many may be under way, which would be a 503 with a reason."""
    for it in event.recorder.interactions.values():
        if it.response is not None and it.response.status_code == 201 and it.request.uri.endswith("/v1/uploads"):
            httpx.delete(f"{server.url}/v1/uploads/{it.response.json()['id']}")


def _is_mistaken(failure: Any, recorder: Any) -> bool:
    """Two that are none: a request that is to be wrong and of which schemathesis itself says that nothing in it is, and
    an adapter that is gone because an earlier request of the scenario has unloaded it by POST."""
    if "Invalid component: positive test case" in failure.message:
        return True
    unloads = [
        it for it in recorder.interactions.values() if it.request.uri.endswith("unload_lora_adapter")
        and it.response is not None and it.response.status_code == 200
    ]  # fmt: skip
    return failure.title == "Created resource not found" and bool(unloads)


def _take(outcome: Outcome, event: events.ScenarioFinished) -> None:
    recorder = event.recorder
    for case_id, node in recorder.cases.items():
        interaction = recorder.interactions.get(case_id)
        if interaction is None:
            continue
        operation = outcome.operations[node.value.operation.label]
        operation.by_phase[event.phase.value.split()[0].lower()] += 1
        if interaction.response is not None:
            operation.by_status[interaction.response.status_code] += 1
            is_sound = node.value.meta is not None and node.value.meta.generation.mode.is_positive
            operation.num_sound += is_sound
            operation.num_taken += is_sound and interaction.response.status_code < 300
        for check in recorder.checks.get(case_id, ()):
            if check.failure_info is not None and not _is_mistaken(check.failure_info.failure, recorder):
                operation.num_failures += 1
                failure = check.failure_info.failure
                outcome.failures.append(
                    f"{node.value.operation.label}: {check.name}: {failure.title}: {failure.message}\n    "
                    f"{check.failure_info.code_sample[:1500]}"
                )


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask a small server whatever its own document lets one ask.")
    parser.add_argument("--examples", type=int, default=100, metavar="N", help="of each operation in the fuzzing phase")
    parser.add_argument("--seed", type=int, default=random.getrandbits(32), metavar="N")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        server = make_server(Path(directory)).wait_ready()
        try:
            outcome = run(server, Path(directory), options.seed, options.examples)
            settle(server)
        finally:
            status = server.stop()
    print("\n".join(outcome.lines()))
    print(f"seed {options.seed}; the server ended with status {status}")
    for failure in outcome.failures:
        print(f"- {failure}")
    return 1 if outcome.failures or status else 0


if __name__ == "__main__":
    sys.exit(main())
