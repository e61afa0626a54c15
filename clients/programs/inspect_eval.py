"""Inspect: an evaluation of the demo's skills through its provider for servers like OpenAI's."""
# /// script
# dependencies = ["inspect-ai", "openai"]
# ///

import os
from pathlib import Path

os.environ["HEDDLE_BASE_URL"] = f"{os.environ.get('HEDDLE_URL', 'http://127.0.0.1:8000')}/v1"
os.environ["HEDDLE_API_KEY"] = "none"

from inspect_ai import Task, eval
from inspect_ai.dataset import FieldSpec, Sample, json_dataset
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import exact, includes, perplexity
from inspect_ai.solver import generate, system_message

MATERIAL = Path(os.environ.get("HEDDLE_MATERIAL", "material"))
SKILLS = {"intent": 1.0, "csv": 1.0, "roman": 0.9, "iso-date": 1.0}  # at least so many right; demo/README.md


def _task(skill, scorer=None):
    return Task(
        name=skill,
        dataset=json_dataset(
            str(MATERIAL / "exercises" / f"{skill}.jsonl"), FieldSpec(input="question", target="answer")
        ),
        solver=generate(),
        scorer=scorer or exact(),
        config=GenerateConfig(temperature=0, max_tokens=80, seed=1),
    )


def _scores(tasks, model, **more):
    logs = eval(tasks, model=model, log_dir="logs", display="none", **more)
    assert all(log.status == "success" for log in logs), [log.error for log in logs]
    scores = {}
    for log in logs:
        scores[log.eval.task] = next(iter(log.results.scores[0].metrics.values())).value
    return scores


def adapters():
    """eval of openai-api/heddle/… with LoRA and ESFT adapters: as right as the demo says"""
    for skill, least in SKILLS.items():
        [score] = _scores([_task(skill)], f"openai-api/heddle/{skill}").values()
        assert score >= least, (skill, score)


def base():
    """the base, which has none of the skills"""
    scores = _scores([_task(skill, includes()) for skill in ("intent", "csv")], "openai-api/heddle/heddle-demo")
    assert max(scores.values()) <= 0.1, scores


def models_together():
    """several models and tasks at the same time"""
    models = [f"openai-api/heddle/{skill}" for skill in ("roman", "iso-date")]
    logs = eval([_task("roman"), _task("iso-date")], model=models, max_tasks=4, log_dir="logs", display="none")
    assert len(logs) == 4 and all(log.status == "success" for log in logs)
    for log in logs:
        score = next(iter(log.results.scores[0].metrics.values())).value
        assert score >= 0.9 if log.eval.model.endswith(log.eval.task) else score <= 0.1, (log.eval.model, score)


def streamed():
    """streams, stop strings and a system message"""
    task = _task("intent", includes())
    task.solver = [system_message("Commands."), generate()]
    model = get_model("openai-api/heddle/intent", stream=True, config=GenerateConfig(stop_seqs=["\n\n"]))
    [score] = _scores([task], model).values()
    assert score >= 0.5, score


def logprobs():
    """logprobs"""
    [log] = eval(_task("intent"), model="openai-api/heddle/intent", logprobs=True, top_logprobs=2, limit=4,
                 log_dir="logs", display="none")  # fmt: skip
    assert log.status == "success", log.error
    for sample in log.samples:
        places = sample.output.choices[0].logprobs.content
        assert places and all(it.logprob <= 0 and len(it.top_logprobs) == 2 for it in places)


def prompt_logprobs():
    """perplexity by prompt_logprobs"""
    dataset = [Sample(input=it.input) for it in _task("roman").dataset]
    task = Task(dataset=dataset, solver=generate(), scorer=perplexity(),
                config=GenerateConfig(prompt_logprobs=1, max_tokens=1, temperature=0))  # fmt: skip
    [log] = eval(task, model="openai-api/heddle/roman", log_dir="logs", display="none")
    assert log.status == "success", log.error
    assert all(score.value > 0 for sample in log.samples for score in sample.scores.values())


def completions():
    """openai-api-completions/"""
    task = _task("iso-date")
    for sample in task.dataset:
        sample.input = f"User: {sample.input}\n\nAssistant:"
    [score] = _scores([task], "openai-api-completions/heddle/iso-date").values()
    assert score >= SKILLS["iso-date"], score


def responses():
    """responses_api"""
    model = get_model("openai-api/heddle/iso-date", responses_api=True)
    [score] = _scores([_task("iso-date")], model).values()
    assert score >= SKILLS["iso-date"], score
