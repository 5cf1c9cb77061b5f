"""A GPU's kernels are compiled when an encoder-decoder starts. Without a GPU nothing is compiled; but which forms of
the kernels would be, in the rehearsal and by requests, shows on any machine. `test_gpu_seq2seq.py` asks a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from core_driver import Driver
from octavo import SamplingParams
from tiny_seq2seq import Seq2SeqParts, make_seq2seq

pytest.importorskip("triton")

from octavo.attention import triton as backend
from octavo.execute import rehearsal, seq2seq
from octavo_kernels import (
    forbid_tokens_reference,
    gumbel_sample_reference,
    paged_attention_reference,
    step_inputs_reference,
    tiles,
    top_k_top_p_min_p_reference,
)
from octavo_kernels.ahead import _form
from octavo_kernels.attention_triton import paged_attention_triton
from octavo_kernels.filter_triton import top_k_top_p_min_p_triton
from octavo_kernels.forbid_triton import forbid_tokens_triton
from octavo_kernels.gumbel_triton import gumbel_sample_triton
from octavo_kernels.steps_triton import step_inputs_triton
from triton.runtime.jit import JITFunction

LENGTH = 1100


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> dict[Any, str]:
    """Form -> name of the kernel: what an H100 would be asked to run. What it would give comes from the twins."""
    found: dict[Any, str] = {}

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found[_form(self, args, kwargs)] = self.__name__

    def both(kernel: Callable[..., Any], twin: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (kernel(*args, **kwargs), twin(*args, **kwargs))[1]

    @contextmanager
    def at_once() -> Any:
        yield

    monkeypatch.setattr(JITFunction, "run", note)
    monkeypatch.setattr(tiles, "architecture", lambda device: 90)
    monkeypatch.setattr(backend, "paged_attention", both(paged_attention_triton, paged_attention_reference))
    monkeypatch.setattr(rehearsal, "step_inputs", both(step_inputs_triton, step_inputs_reference))
    for place in (rehearsal, "octavo.decode.sampler"):
        for name, kernel, twin in (
            ("gumbel_sample", gumbel_sample_triton, gumbel_sample_reference),
            ("forbid_tokens", forbid_tokens_triton, forbid_tokens_reference),
            ("top_k_top_p_min_p", top_k_top_p_min_p_triton, top_k_top_p_min_p_reference),
        ):
            target = f"{place if isinstance(place, str) else place.__name__}.{name}"
            monkeypatch.setattr(target, both(kernel, twin))
    monkeypatch.setattr(rehearsal, "compiled_ahead", at_once)
    monkeypatch.setattr(
        seq2seq, "_attention", lambda device, dtype, config, size: backend.TritonAttention(config.num_kv_heads)
    )
    return found


@pytest.mark.slow
def test_requests_ask_for_no_other_kernel(forms: dict[Any, str], tmp_path: Path) -> None:
    """In float16, where partial sums are of another type than results."""
    make_seq2seq("m2m100", tmp_path, max_position_embeddings=LENGTH)
    parts = Seq2SeqParts(tmp_path, torch.float16, length=LENGTH)
    core = parts.core(num_blocks=2000, max_num_seqs=300, budget=1200, depth=1)
    table = core.runner.table  # type: ignore[attr-defined]
    table._step_inputs = rehearsal.step_inputs
    rehearsal.rehearse(core.runner, parts.config.num_kv_heads, LENGTH)  # type: ignore[arg-type]
    rehearsed = dict(forms)
    assert not any(memory.any() for memory in core.runner.kv.tensors), "it wrote keys"  # type: ignore[attr-defined]
    forms.clear()
    rng, driver = random.Random(0), Driver(core)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.9, "presence_penalty": 0.5},
        {"use_beam_search": True, "beam_width": 3},
    ]  # fmt: skip
    for lengths in ([1], [3], [70], [5, 90], [20] * 7, [300] * 2, [LENGTH], [LENGTH - 50, *[4] * 270]):
        for number, length in enumerate(lengths):
            source = [rng.randrange(3, 150) for _ in range(length)]
            prompt = [2, 77] if number % 2 else [2]
            params = SamplingParams(max_tokens=3, **kinds[rng.randrange(4) if len(lengths) < 50 else 0])
            driver.add(prompt, params, source=source, eos=[2])
        driver.run()
        assert driver.errors == {}
        assert [forms[form] for form in forms.keys() - rehearsed.keys()] == [], lengths[:2]
    assert rehearsed.keys() - forms.keys() <= {f for f, name in rehearsed.items() if name == "forbid_tokens_kernel"}
