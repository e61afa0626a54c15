"""lm-evaluation-harness, by its command: what it measures through the server is what merged weights would have.

HEDDLE_MATERIAL has its tasks, and what Transformers alone makes of the same exercises with the adapter's weights merged
into the base's.
"""
# /// script
# dependencies = ["lm-eval[api]", "transformers"]
# ///

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL = os.environ.get("HEDDLE_URL", "http://127.0.0.1:8000")
TOKENIZER = os.environ.get("HEDDLE_BASE", "demo/base")
MATERIAL = Path(os.environ.get("HEDDLE_MATERIAL", "material"))
BASE = "heddle-demo"
ADAPTERS = ("intent", "csv", "french-dates", "roman")  # a LoRA, a DoRA, LoRA on the routed experts, ESFT
TOLERANCE = 1e-3  # of a sum of log-probabilities
TOKENS = {"tokenizer_backend": "huggingface", "tokenizer": TOKENIZER, "tokenized_requests": "True"}


def _evaluate(runs, kind, route, batch=1, **more):
    """Runs lm_eval for all (model, skill) of `runs` at the same time. Returns the score and the samples of each."""
    with tempfile.TemporaryDirectory() as made:
        processes, statuses = [], []
        for index, (model, skill) in enumerate(runs):
            told = {"model": model, "base_url": f"{URL}/v1/{route}", "max_length": 1024, **more}
            command = [
                sys.executable, "-m", "lm_eval", "run", "--model", f"local-{route.replace('/', '-')}",
                "--model_args", ",".join(f"{name}={value}" for name, value in told.items()),
                "--include_path", str(MATERIAL / "tasks"), "--tasks", f"{skill.replace('-', '_')}_{kind}",
                "--batch_size", str(batch), "--apply_chat_template",
                "--log_samples", "--output_path", f"{made}/{index}",
            ]  # fmt: skip
            processes.append(subprocess.Popen(command))
        try:
            statuses = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert not any(statuses), f"lm_eval ended with {statuses}; its log says why"
        return [_found(Path(made) / str(index)) for index in range(len(runs))]


def _found(folder):
    [results] = folder.rglob("results_*.json")
    [metrics] = json.loads(results.read_text())["results"].values()
    [samples] = folder.rglob("samples_*.jsonl")
    [score] = [
        value for name, value in metrics.items() if name.partition(",")[0] in ("acc", "exact_match", "byte_perplexity")
    ]
    return score, sorted(map(json.loads, samples.read_text().splitlines()), key=lambda it: it["doc_id"])


def _merged(model, skill):
    return json.loads((MATERIAL / "merged" / f"{model}.json").read_text())[skill]


def _compare_choices(runs, **more):
    """Each choice's sum of log-probabilities, whether greedy decoding says it, and how many of a task are right."""
    for (model, skill), (score, samples) in zip(runs, _evaluate(runs, "choose", "completions", **more), strict=True):
        expected = _merged(model, skill)
        right, furthest = 0, 0.0
        assert len(samples) == len(expected) > 0
        for sample, told in zip(samples, expected, strict=True):
            for response, (logprob, is_greedy) in zip(sample["resps"], told["choices"], strict=True):
                [(value, greedy)] = response
                furthest = max(furthest, abs(float(value) - logprob))
                assert furthest <= TOLERANCE, (model, skill, value, logprob)
                assert str(greedy) == str(is_greedy), (model, skill, sample["doc"], greedy)
            sums = [logprob for logprob, _ in told["choices"]]
            right += sums.index(max(sums)) == sample["doc"]["label"]
        assert abs(score - right / len(expected)) < 1e-9, (model, skill, score, right)
        print(f"{model} on {skill}: {score:.1%} as merged, sums differ by at most {furthest:.1e}", file=sys.stderr)


def _compare_answers(runs, route, **more):
    for (model, skill), (score, samples) in zip(runs, _evaluate(runs, "write", route, **more), strict=True):
        expected = _merged(model, skill)
        assert [it["resps"][0][0].strip() for it in samples] == [it["answer"] for it in expected], (model, skill)
        right = sum(it["doc"]["answer"] == told["answer"] for it, told in zip(samples, expected, strict=True))
        assert abs(score - right / len(expected)) < 1e-9, (model, skill, score, right)


def choices():
    """multiple choice with local-completions: log-probabilities of a LoRA, a DoRA, LoRA on experts and an ESFT adapter,
    measured at the same time, equal those of merged weights"""
    _compare_choices([(skill, skill) for skill in ADAPTERS], batch=8, num_concurrent=4, **TOKENS)


def choices_of_base():
    """the same of the base, one request after the other"""
    _compare_choices([(BASE, "intent"), (BASE, "roman")], batch=4, num_concurrent=1, **TOKENS)


def texts():
    """loglikelihood_rolling with local-completions: equal to merged weights"""
    runs = [("csv", "csv"), ("roman", "roman")]
    for (model, skill), (_, samples) in zip(
        runs, _evaluate(runs, "read", "completions", 8, num_concurrent=2, **TOKENS), strict=True
    ):
        for sample, told in zip(samples, _merged(model, skill), strict=True):
            [[value]] = sample["resps"]
            assert abs(float(value) - told["read"]) <= TOLERANCE, (model, value, told["read"])


def answers():
    """generate_until with local-completions: the answers and the score of merged weights"""
    _compare_answers([("intent", "intent"), ("roman", "roman")], "completions", batch=8, num_concurrent=4, **TOKENS)


def chat_answers():
    """generate_until with local-chat-completions: the answers and the score of merged weights"""
    runs = [("csv", "csv"), ("french-dates", "french-dates"), (BASE, "roman")]
    _compare_answers(runs, "chat/completions", num_concurrent=4)
