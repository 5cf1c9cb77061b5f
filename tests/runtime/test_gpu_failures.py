"""On a machine with an NVIDIA GPU: a request whose numbers are broken fails alone, by whatever way its tokens are
chosen. An index out of its bounds there would end everything that runs on the card. Skipped elsewhere; see
`test_failures.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from octavo import LLM, SamplingParams, StructuredOutputsParams
from octavo.errors import RequestFailedError
from safetensors.torch import load_file, save_file
from tiny_models import make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

BAD = {"nan": 250, "inf": 251}
NEVER = dict.fromkeys(BAD.values(), -1e4)
PROMPTS = [[(i * j) % 240 + 2 for i in range(length)] for j, length in ((3, 5), (5, 40), (7, 17), (9, 64))]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 0.9},
    "with a bias": {"temperature": 1.0, "n": 2, "logit_bias": NEVER},
    "filtered": {"temperature": 1.0, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalised": {"temperature": 0.8, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    "reported": {"temperature": 0.7, "logprobs": 3, "prompt_logprobs": 2},
    "searched": {"use_beam_search": True, "beam_width": 3},
    "under a grammar": {"temperature": 1.0, "structured_outputs": StructuredOutputsParams(regex="[a-z]{30,}")},
}


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokens have broken embeddings. They are hardly ever made, and not with the seeds of these tests."""
    folder = make_model("llama-head-dim", tmp_path_factory.mktemp("fragile"))
    tensors = load_file(folder / "model.safetensors")
    for kind, token in BAD.items():
        tensors["model.embed_tokens.weight"][token] = float(kind)
        tensors["lm_head.weight"][token] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("blocks", [300, 14])
def test_a_broken_prompt_fails_alone(fragile: Path, blocks: int) -> None:
    with LLM(str(fragile), dtype="float32", num_blocks=blocks, block_size=16) as llm:
        for way, options in WAYS.items():
            params = SamplingParams(seed=3, max_tokens=24, ignore_eos=way != "under a grammar", **options)
            alone = [[made.token_ids for made in llm.generate(prompt, params)[0].outputs] for prompt in PROMPTS]
            for kind, bad in BAD.items():
                guilty = [[bad], [*PROMPTS[3], bad], [*PROMPTS[3][:20], bad, *PROMPTS[3][20:]]]
                batch = [guilty[0], *PROMPTS[:2], guilty[1], *PROMPTS[2:], guilty[2]]
                for output, prompt in zip(llm.generate(batch, params, return_exceptions=True), batch, strict=True):
                    if prompt in guilty:
                        assert isinstance(output, RequestFailedError), (way, kind)
                        assert "finite" in str(output)
                    else:
                        assert not isinstance(output, BaseException), (way, kind, output)
                        assert [made.token_ids for made in output.outputs] == alone[PROMPTS.index(prompt)], (way, kind)
                assert llm.stats().blocks_used == 0
                assert llm.engine.service.call(lambda core: len(core.scheduler.suspects)) == 0


def test_broken_logits_of_sound_states(fragile: Path, tmp_path: Path) -> None:
    """Of one token: the head is broken, nothing before it."""
    tensors = load_file(fragile / "model.safetensors")
    tensors["lm_head.weight"][7] = float("nan")
    for file in fragile.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with LLM(str(tmp_path), dtype="float32") as llm:
        for way, options in WAYS.items():
            (output,) = llm.generate([PROMPTS[1]], SamplingParams(max_tokens=5, **options), return_exceptions=True)
            # a grammar forbids this token, and what may not come harms nobody
            assert isinstance(output, RequestFailedError) == (way != "under a grammar"), way
