"""OpenVINO GenAI's continuous batching, asked in lines of JSON: first what to load, then one batch after the other.
With two arguments, BASE and TARGET, it only converts a model.

A batch for the base goes through add_request and step, which tell when each token came. `add_request` ignores adapters
without a word, so requests for adapters go through `generate`, one call for each adapter.
"""
# /// script
# dependencies = ["openvino-genai", "openvino-tokenizers", "optimum-intel", "torch==2.13.0"]
# ///

import json
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy
import openvino
import openvino_genai as genai


def convert(base, directory):
    """To OpenVINO's own format, float32; once."""
    if not (directory / "openvino_model.xml").exists():
        subprocess.run([sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", base,
                        "--task", "text-generation-with-past", "--weight-format", "fp32", str(directory)],
                       stdout=sys.stderr, check=True)  # fmt: skip


class Served:
    def __init__(self, asked):
        self.adapters = {name: genai.Adapter(path) for name, (path, _) in asked["adapters"].items()}
        self.scales = {name: scale for name, (_, scale) in asked["adapters"].items()}
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2
        scheduler.max_num_seqs = asked["max_running"]
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32",
                      "INFERENCE_NUM_THREADS": asked["threads"]}  # fmt: skip
        directory = asked["converted"]
        self.plain = genai.ContinuousBatchingPipeline(directory, scheduler, "CPU", properties)
        self.adapted = None
        if self.adapters:
            known = genai.AdapterConfig(list(self.adapters.values()), mode=genai.AdapterConfig.Mode.MODE_DYNAMIC)
            self.adapted = genai.ContinuousBatchingPipeline(
                directory, scheduler, "CPU", {**properties, "adapters": known}
            )
        self._numbers = 0

    def base(self, jobs, new_tokens):
        start, answers, handles = time.perf_counter(), [], {}
        for index, job in enumerate(jobs):
            self._numbers += 1
            handles[index] = self.plain.add_request(self._numbers, tensor(job), greedy(new_tokens))
            answers.append({"tokens": [], "times": [], "sent": 0.0, "end": 0.0})
        while handles:
            self.plain.step()
            now = time.perf_counter() - start
            for index, handle in list(handles.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        answers[index]["tokens"] += output.generated_ids
                        answers[index]["times"] += [now] * len(output.generated_ids)
                if len(answers[index]["tokens"]) >= new_tokens:
                    answers[index]["end"] = now
                    del handles[index]
        while self.plain.has_non_finished_requests():
            self.plain.step()
        return answers

    def grouped(self, jobs, new_tokens):
        start, answers = time.perf_counter(), [None] * len(jobs)
        for name in dict.fromkeys(job["adapter"] for job in jobs):
            members = [index for index, job in enumerate(jobs) if job["adapter"] == name]
            config = greedy(new_tokens)
            config.adapters = (
                genai.AdapterConfig(self.adapters[name], self.scales[name]) if name else genai.AdapterConfig()
            )
            told = self.adapted.generate([tensor(jobs[it]) for it in members], [config] * len(members))
            now = time.perf_counter() - start
            for index, result in zip(members, told, strict=True):
                tokens = [int(it) for it in result.m_generation_ids[0]]
                answers[index] = {"tokens": tokens, "times": [], "sent": 0.0, "end": now}
        return answers


def tensor(job):
    return openvino.Tensor(numpy.array([job["prompt"]], dtype=numpy.int64))


def greedy(new_tokens):
    config = genai.GenerationConfig()
    config.max_new_tokens = new_tokens
    config.ignore_eos = True
    config.eos_token_id, config.stop_token_ids = 0, {0}  # the model has none, and -1 is refused
    config.do_sample = False
    return config


def main():
    if sys.argv[1:]:
        convert(sys.argv[1], Path(sys.argv[2]))
        return
    asked = json.loads(sys.stdin.readline())
    served = Served(asked)
    print(json.dumps({"versions": {it: version(it) for it in ("openvino", "openvino-genai")}}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        run = served.grouped if any(job["adapter"] for job in asked["jobs"]) else served.base
        print(json.dumps({"answers": run(asked["jobs"], asked["new_tokens"])}), flush=True)


if __name__ == "__main__":
    main()
