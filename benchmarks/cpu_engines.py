"""The engines that `cpu.py` measures, each behind the same few lines, and the process that one of them runs in.

    <interpreter with the engine> benchmarks/cpu_engines.py '{"engine": "vllm", "model": ..., ...}'

Imports nothing of the engine until it is asked for, and nothing of Octavo unless Octavo is measured: a peer's
interpreter has only the peer. Every engine runs as its own documentation says is quickest on a CPU.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from cpu_llama_cpp import LlamaBatched, LlamaOneByOne
from cpu_workloads import RUN, limits, warm_up

# an engine that imports `kernels` shall not find kernels.py here
sys.path[:] = [place for place in sys.path if Path(place).absolute() != Path(__file__).absolute().parent]


class Octavo:
    prefix_cache = True

    def __init__(self, model: str, **settings: Any) -> None:
        from octavo import LLM, SamplingParams

        self.llm, self.params = LLM(model, **settings), SamplingParams

    def generate(self, prompts: list[list[int]], counts: list[int], shared: int = 0) -> int:
        params = [self.params(temperature=0, ignore_eos=True, max_tokens=count) for count in counts]
        outputs = self.llm.generate(prompts, params)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def about(self, requests: int) -> dict[str, Any]:
        from octavo.bench.machine import limit_of

        limit = limit_of(self.llm.engine)
        found: dict[str, Any] = {"weights": self.llm.engine.limits.weights, "limits": limits(limit.rate, requests)}
        return found | {"bandwidth": limit.machine.bandwidth, "products": limit.machine.products}


class Transformers:
    """Static batches of requests in the order of their length, so that padding is small. A batch runs until its
    longest answer is done, and only the tokens asked for are counted."""

    prefix_cache = False

    def __init__(self, model: str, dtype: str = "bfloat16", batch: int = 32, dummy: bool = False) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        self.torch, self.batch = torch, batch
        path, kind = Path(model), getattr(torch, dtype)
        if dummy:
            self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=kind).eval()
            return
        place = {"gguf_file": path.name} if path.is_file() else {}
        folder = str(path.parent if path.is_file() else path)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, **place).eval()

    def generate(self, prompts: list[list[int]], counts: list[int], shared: int = 0) -> int:
        work = sorted(zip(prompts, counts, strict=True), key=lambda item: len(item[0]))
        for start in range(0, len(work), self.batch):
            items = work[start : start + self.batch]
            longest, most = max(len(ids) for ids, _ in items), max(count for _, count in items)
            with self.torch.inference_mode():
                self.model.generate(
                    input_ids=self.torch.tensor([[0] * (longest - len(ids)) + ids for ids, _ in items]),
                    attention_mask=self.torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i, _ in items]),
                    do_sample=False, max_new_tokens=most, min_new_tokens=most, pad_token_id=0,
                )  # fmt: skip
        return sum(counts)


class VLLM:
    prefix_cache = True

    def __init__(self, model: str, by: str = "one process", **settings: Any) -> None:
        # by itself it runs the engine in a second process: one stream is slower then, and memory more
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(by != "one process"))
        from vllm import LLM, SamplingParams

        settings = {"dtype": "bfloat16", "max_model_len": 2048, "max_num_seqs": 64, **settings}
        self.llm = LLM(model, skip_tokenizer_init=True, enable_prefix_caching=True, seed=0, **settings)
        self.params = SamplingParams

    def generate(self, prompts: list[list[int]], counts: list[int], shared: int = 0) -> int:
        params = [
            self.params(temperature=0, ignore_eos=True, max_tokens=count, min_tokens=count, detokenize=False)
            for count in counts
        ]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    def about(self, requests: int) -> dict[str, Any]:
        return {"preloaded": os.environ.get("LD_PRELOAD", "").split(":")}


class OpenVINO:
    prefix_cache = True

    def __init__(self, model: str, batched: int = 512, properties: dict[str, Any] | None = None) -> None:
        import numpy
        import openvino
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = batched
        scheduler.enable_prefix_caching = True
        self.pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties or {})
        self.tensor = lambda ids: openvino.Tensor(numpy.array([ids], dtype=numpy.int64))
        self.config = genai.GenerationConfig

    def generate(self, prompts: list[list[int]], counts: list[int], shared: int = 0) -> int:
        configs = []
        for count in counts:
            config = self.config()
            config.max_new_tokens, config.min_new_tokens, config.ignore_eos = count, count, True
            config.do_sample = False
            configs.append(config)
        results = self.pipeline.generate([self.tensor(ids) for ids in prompts], configs)
        return sum(len(result.m_generation_ids[0]) for result in results)


ENGINES: dict[str, Any] = {
    "octavo": Octavo,
    "transformers": Transformers,
    "llama.cpp": lambda model, by, **settings: (LlamaBatched if by == "batch" else LlamaOneByOne)(model, **settings),
    "vllm": VLLM,
    "openvino": OpenVINO,
}


def peak_memory() -> float:
    """Peak resident MB of this process and of those that it started, added up."""
    parents: dict[int, int] = {}
    peaks: dict[int, float] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:
            continue  # it ended
        pid = int(status.parent.name)
        parents[pid] = int(lines["PPid"])
        peaks[pid] = int(lines.get("VmHWM", "0 kB").split()[0]) * 1024 / 1e6
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(peaks.get(pid, 0) for pid in mine)


def main() -> None:
    asked = json.loads(sys.argv[1])
    engine = ENGINES[asked["engine"]](asked["model"], **asked["settings"])
    engine.generate([[1000, 2000, 3000]], [1])
    found: dict[str, Any] = {"first_token_at": time.time(), "failed": {}}
    warm_up(engine)
    for name, run in RUN.items():
        if name in asked["workloads"]:
            try:
                found[name] = run(engine, asked["requests"])
            except Exception as problem:
                found["failed"][name] = f"{type(problem).__name__}: {problem}".splitlines()[-1]
        if name == "W3" and name in found:
            found["memory"] = peak_memory()
    if hasattr(engine, "about"):
        found |= engine.about(asked["requests"])
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)  # what an engine does when its process ends is not measured, and some hang there


if __name__ == "__main__":
    main()
