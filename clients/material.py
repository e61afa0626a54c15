"""What programs ask and compare with: exercises of the demo's skills, and what merged weights make of them.

    exercises/<skill>.jsonl  question and answer, and choices of which `label` is right
    tasks/<skill>_*.yaml     the same as tasks of lm-evaluation-harness
    merged/<model>.json      log-probabilities of those choices and of texts, and answers, by Transformers alone

Merged literally: PEFT writes a LoRA into the base's matrices, and an ESFT adapter's experts replace the base's.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from demo.evaluate import adapted
from demo.model import answers
from demo.pair import Pair, rendered
from demo.skills import SKILLS, sample
from demo.tuning import load_base

ROOT = Path(__file__).resolve().parents[1] / "demo"
BASE = "heddle-demo"  # what the server calls it
COUNT, CHOICES = 16, 4
# a LoRA, a DoRA, LoRA on the routed experts, ESFT
COMPARED = ("intent", "csv", "french-dates", "roman")
CHOOSE = """\
task: {skill}_choose
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""
WRITE = """\
task: {skill}_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 64, do_sample: false}}
filter_list: [{{name: stripped, filter: [{{function: remove_whitespace}}, {{function: take_first}}]}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


READ = """\
task: {skill}_read
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}} {{{{answer}}}}"
metric_list: [{{metric: byte_perplexity}}]
metadata: {{version: 1}}
"""


def write(directory: Path) -> None:
    """Everything, below `directory`."""
    for name in ("exercises", "tasks", "merged"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    exercises = {name: _exercises(sample(skill, count=COUNT)) for name, skill in SKILLS.items()}
    for name, own in exercises.items():
        data = directory / "exercises" / f"{name}.jsonl"
        data.write_text("".join(json.dumps(it, ensure_ascii=False) + "\n" for it in own), encoding="utf-8")
        for kind, task in (("choose", CHOOSE), ("write", WRITE), ("read", READ)):
            text = task.format(skill=name.replace("-", "_"), data=data)
            (directory / "tasks" / f"{name}_{kind}.yaml").write_text(text, encoding="utf-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    base, tokenizer = load_base(ROOT / "base")
    told = {BASE: {name: _told(base, tokenizer, exercises[name]) for name in COMPARED}}
    for name in COMPARED:
        model = adapted(SKILLS[name], ROOT / "base", ROOT / "adapters" / name)
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        told[name] = {name: _told(model, tokenizer, exercises[name])}
    torch.set_num_threads(threads)
    for name, of_skills in told.items():
        text = json.dumps(of_skills, ensure_ascii=False, indent=1)
        (directory / "merged" / f"{name}.json").write_text(text, encoding="utf-8")


def _exercises(pairs: Sequence[Pair]) -> list[dict[str, object]]:
    """The wrong choices are right elsewhere. They begin with the space that follows `Assistant:`, as adapters do."""
    rng, rows = Random(0), []
    for pair in pairs:
        others = sorted({it.answer for it in pairs} - {pair.answer})
        choices = [pair.answer, *rng.sample(others, CHOICES - 1)]
        rng.shuffle(choices)
        rows.append({"question": pair.question, "answer": pair.answer, "choices": [f" {it}" for it in choices],
                     "label": choices.index(pair.answer)})  # fmt: skip
    return rows


def _told(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, exercises: Sequence[Mapping[str, object]]
) -> list[dict[str, object]]:
    """Of each exercise: [sum of log-probabilities, is it what greedy decoding says] of each choice, the answer, and the
    sum for question and answer as a plain text."""
    turns = [[{"role": "user", "content": it["question"]}] for it in exercises]
    contexts = [rendered(tokenizer, None, turn) for turn in turns]
    written = answers(model, tokenizer, contexts)
    told = []
    for exercise, context, answer in zip(exercises, contexts, written, strict=True):
        choices = [_logprob(model, tokenizer, context, it) for it in exercise["choices"]]  # type: ignore[attr-defined]
        read, _ = _logprob(model, tokenizer, tokenizer.bos_token, f"{exercise['question']} {exercise['answer']}")
        told.append({"choices": choices, "answer": answer, "read": read})
    return told


@torch.inference_mode()
def _logprob(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: str, continuation: str
) -> tuple[float, bool]:
    tokens = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    begin = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    logprobs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    places, own = range(begin - 1, len(tokens) - 1), tokens[begin:]
    total = sum(float(logprobs[place, token]) for place, token in zip(places, own, strict=True))
    return total, all(int(logprobs[place].argmax()) == token for place, token in zip(places, own, strict=True))
