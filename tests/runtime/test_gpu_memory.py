"""Memory of a real GPU: what an engine takes stays within its share, and all of it comes back. Skipped elsewhere;
`test_sizing.py` has the arithmetic.

What is asked of the whole card runs in a process of its own, on a card that nobody else uses."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo import LLM, SamplingParams
from octavo.errors import ConfigError
from octavo.execute.sizing import Card
from tiny_models import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
MIB, GIB = 2**20, 2**30

CYCLES = """
import json, sys, time
import torch
from octavo import LLM, SamplingParams

model, cycles, dtypes, settings = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(","), json.loads(sys.argv[4])
prompts = [[5, 6, 7], [9] * 40]
if settings["max_num_batched_tokens"] > 4096:
    prompts.append([8] * 4300)
params = [SamplingParams(temperature=0.9, max_tokens=4, ignore_eos=True), SamplingParams(top_p=0.9, logprobs=1,
          max_tokens=4, presence_penalty=0.5, ignore_eos=True), SamplingParams(temperature=0, max_tokens=2)]
closed, loaded, seconds = [], [], []
for cycle in range(cycles):
    began = time.monotonic()
    llm = LLM(model, dtype=dtypes[cycle % len(dtypes)], **settings)
    llm.generate(prompts, params[:len(prompts)])
    free, total = torch.cuda.mem_get_info()
    loaded.append(total - free)
    llm.close()
    del llm
    seconds.append(time.monotonic() - began)
    free, total = torch.cuda.mem_get_info()
    closed.append((total - free, torch.cuda.memory_reserved(), torch.cuda.memory_allocated()))
json.dump({"closed": closed, "loaded": loaded, "seconds": seconds}, sys.stdout)
"""


def run(script: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def check_cycles(found: dict[str, Any], warm: int) -> None:
    """The first `warm` engines load kernels and libraries, whose code stays with the process."""
    used, reserved, allocated = (list(column) for column in zip(*found["closed"], strict=True))
    late = found["seconds"][warm:]
    print(
        f"in use after {warm} cycles {used[warm - 1] / MIB:.1f} MiB, then at most {max(used[warm:]) / MIB:.1f}, at "
        f"the end {used[-1] / MIB:.1f}; by torch {reserved[warm - 1] / MIB:.1f} and {reserved[-1] / MIB:.1f}; "
        f"{sum(late) / len(late):.2f} s a cycle"
    )
    assert min(found["loaded"]) - max(used) > 8 * MIB, "an engine takes next to nothing: a weak test"
    assert max(used[warm:]) - used[warm - 1] <= 16 * MIB
    assert max(reserved[warm:]) - reserved[warm - 1] <= 16 * MIB
    assert max(allocated[warm:]) - allocated[warm - 1] <= MIB


def test_100_engines_one_after_the_other_leave_nothing_on_the_card(tmp_path: Path) -> None:
    path = make_model("llama-bias", tmp_path)  # biases take another library than plain products
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory": 32 * MIB}
    check_cycles(run(CYCLES, str(path), "100", "bfloat16,float32", json.dumps(settings)), 2)


def test_engines_that_plan_long_prompts_leave_nothing_on_the_card(tmp_path: Path) -> None:
    path = make_model("llama-head-dim", tmp_path, max_position_embeddings=8192, head_dim=64)
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 4608, "kv_cache_memory": 64 * MIB}
    check_cycles(run(CYCLES, str(path), "12", "bfloat16", json.dumps(settings)), 2)


SHARE = """
import json, sys
import torch
from octavo import LLM, SamplingParams
from octavo.config import EngineConfig
from octavo.execute.build import resolve_settings
from octavo.models.config import load_config
from octavo.models.sources import resolve

settings = {"load_format": "dummy", "gpu_memory_utilization": float(sys.argv[2])}
files = resolve(sys.argv[1], need_weights=False)
sizes = resolve_settings(EngineConfig(model=sys.argv[1], **settings), files, load_config(files)).sizes
llm = LLM(sys.argv[1], **settings)

def used():
    free, total = torch.cuda.mem_get_info()
    return total - free

ready = used()
engine = llm.engine
many = [[(7 * n + i) % 290 + 5 for i in range(60)] for n in range(256)]
everything = dict(max_tokens=3, ignore_eos=True, logprobs=3, presence_penalty=0.5, repetition_penalty=1.1, top_p=0.9,
                  top_k=50, temperature=0.8)
llm.generate(many, SamplingParams(**everything))
llm.generate(many, SamplingParams(**everything, prompt_logprobs=2))
llm.generate([[9] * 8000] + many[:40], SamplingParams(max_tokens=2))
llm.generate([[7] * 5000, [6] * 3100], SamplingParams(max_tokens=2, prompt_logprobs=1))
worked = used()
limits = engine.limits
json.dump({"ready": ready, "worked": worked, "total": torch.cuda.mem_get_info()[1], "step": sizes.step(),
           "recorded": sizes.recorded(), "sampling": sizes.sampling(), "rows": sizes.rows(),
           "activations": sizes.activations(sizes.max_num_batched_tokens), "weights": limits.weight_bytes,
           "cache": limits.num_blocks * sizes.block_bytes, "seconds": engine.seconds_to_ready}, sys.stdout)
"""


def wide_model(folder: Path, **changes: Any) -> Path:
    """A folder whose configuration asks for a real model's sizes; its weights must not be read."""
    path = make_model("qwen3", folder)
    config = json.loads((path / "config.json").read_text())
    settings = {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    }  # fmt: skip
    config |= settings | changes
    for name in ("layer_types", "max_window_layers"):
        config.pop(name, None)
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_everything_fits_into_the_share_and_uses_it(tmp_path: Path, share: float) -> None:
    """With the sizes of Qwen3-0.6B, after the heaviest steps that requests can ask for."""
    found = run(SHARE, str(wide_model(tmp_path)), str(share))
    beside = found["worked"] - found["weights"] - found["cache"]
    print({name: value if name == "seconds" else f"{value / MIB:.0f} MiB" for name, value in found.items()})
    print(f"beside weights and cache: {beside / MIB:.0f} MiB, context included; the bound is {found['step'] / MIB:.0f}")
    assert found["worked"] <= share * found["total"]
    assert found["ready"] >= 0.85 * share * found["total"]
    assert beside <= found["step"] + GIB


def test_bytes_for_the_cache_are_honoured(tmp_path: Path) -> None:
    path = make_model("llama-head-dim", tmp_path)
    block = 2 * 2 * 2 * 16 * 32 * 2  # keys and values, layers, heads, slots, head size, bytes
    with LLM(str(path), kv_cache_memory=40 * block + 5, max_num_seqs=4, max_num_batched_tokens=64) as llm:
        assert llm.engine.limits.num_blocks == 40
        shapes = llm.engine.service.call(lambda core: {tuple(cache.shape) for cache in core.runner.kv.tensors})
        assert shapes == {(40, 2, 16, 32)}


def test_what_does_not_fit_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    path = str(wide_model(tmp_path))
    began = time.monotonic()
    with pytest.raises(ConfigError, match=r"weights take 1\.\d\d GiB.*It would fit with") as caught:
        LLM(path, gpu_memory_utilization=0.02)
    assert caught.value.field == "gpu_memory_utilization"
    assert "gpu_memory_utilization=0." in str(caught.value)
    with pytest.raises(ConfigError, match="kv_cache_memory=") as caught:
        LLM(path, kv_cache_memory=10**13)
    assert caught.value.field == "kv_cache_memory"
    huge = str(wide_model(tmp_path, num_hidden_layers=400, hidden_size=16384, intermediate_size=65536))
    with pytest.raises(ConfigError, match="whose weights take at most") as caught:
        LLM(huge)
    assert caught.value.field == "model"
    assert time.monotonic() - began < 5
    assert torch.cuda.memory_allocated() < GIB


def test_to_look_at_the_card_takes_no_time() -> None:
    device = torch.device("cuda")
    Card.of(device)
    began = time.monotonic()
    card = Card.of(device)
    assert time.monotonic() - began < 0.05
    assert 0 < card.free < card.total
    assert card.context > 0


@pytest.mark.parametrize(("stage", "layers", "left"), [("loading", 8, GIB), ("getting ready", 1, 1100 * MIB)])
def test_running_out_while_starting_is_an_error_that_helps_and_gives_everything_back(
    stage: str, layers: int, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if another process took the memory after it was looked at: for 3.5 GB of weights, or for the activations of
    8192 tokens, 1.4 GB, after weights of 0.45 GB."""
    path = wide_model(
        tmp_path, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        vocab_size=300, max_position_embeddings=8192,
    )  # fmt: skip
    settings = {"load_format": "dummy", "max_num_seqs": 4, "kv_cache_memory": 64 * MIB}
    with LLM(str(path), max_num_batched_tokens=4352, **settings) as llm:  # kernels and libraries stay with the process
        llm.generate([5, 6, 7], SamplingParams(max_tokens=2))
    card = Card.of(torch.device("cuda"))
    taken = torch.empty(card.free - left, dtype=torch.uint8, device="cuda")
    before, allocated = Card.of(torch.device("cuda")).free, torch.cuda.memory_allocated()
    real = Card.of
    monkeypatch.setattr(Card, "of", lambda device: Card(60 * GIB, 80 * GIB, GIB // 2))
    with pytest.raises(ConfigError, match="ran out of memory while the model was made ready") as caught:
        LLM(str(path), max_num_batched_tokens=8192, **settings)
    monkeypatch.setattr(Card, "of", real)
    assert torch.cuda.memory_allocated() - allocated < MIB, stage
    assert before - real(torch.device("cuda")).free < 64 * MIB, stage  # code of further kernels
    assert caught.value.field == "kv_cache_memory"
    del taken
    with LLM(str(path), max_num_batched_tokens=64, **settings) as llm:  # and the process goes on
        llm.generate([5, 6, 7], SamplingParams(max_tokens=2))
