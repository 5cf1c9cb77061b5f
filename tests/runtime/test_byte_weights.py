"""Encoder-decoders with weights of 8 bits: sums are exact, and what they make is near what float32 makes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from octavo import LLM, SamplingParams
from octavo.attention.texts import TextBatch
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.execute.seq2seq import resolve_seq2seq
from octavo.layers.byte_linear import byte_product, byte_product_relu, quantise_weight
from octavo.models.seq2seq_config import load_seq2seq_config
from octavo.models.sources import resolve
from octavo_kernels.cpu.compiler import available
from tiny_seq2seq import VOCABULARY, Seq2SeqParts, make_seq2seq
from tiny_translators import nllb

pytestmark = pytest.mark.skipif(not available(), reason="needs AVX512-VNNI, AVX512-BF16 and llvmlite")

if available():
    from octavo_kernels.cpu.byte_rows import quantise_rows_reference, scale_rows_reference

WIDE: dict[str, dict[str, Any]] = {
    "m2m100": {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 80},
    "marian": {"d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 80},
    "t5": {"d_kv": 16}, "t5-v1.1": {"d_kv": 16}, "mt5": {"d_kv": 16},
}  # fmt: skip
"""Sizes in multiples of 16, by family."""


def twin(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor, *, relu: bool = False) -> torch.Tensor:
    """`byte_product` in whole numbers and plain torch."""
    (rows, factors), (bytes_, scales) = quantise_rows_reference(x), quantise_weight(weight)
    whole = (rows.long() - 128) @ bytes_.long().T
    return scale_rows_reference(whole * scales, factors, bias, x.dtype, relu=relu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 5), (64, 206), (1024, 96)])
def test_a_product_is_that_of_whole_numbers(inputs: int, outputs: int, relu: bool, dtype: torch.dtype) -> None:
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(33, inputs).to(dtype)
    weight[2] = 0
    product, copied = (byte_product_relu if relu else byte_product)(weight, bias)
    found = product(x)
    assert copied
    assert found.dtype == dtype
    # a value that lies on a half may be rounded to either side
    limit = 0.02 if dtype == torch.float32 else 0.25
    torch.testing.assert_close(found.float(), twin(weight, bias, x, relu=relu).float(), atol=limit, rtol=0.01)
    close = (found.float() - twin(weight, bias, x, relu=relu).float()).abs() < (1e-3 if limit < 0.1 else 0.1)
    assert close.float().mean() > 0.95
    for rows in (1, 2, 7):
        assert torch.equal(product(x[:rows]), found[:rows]), "bits depend on the batch"


def states(parts: Seq2SeqParts, batch: list[list[int]]) -> torch.Tensor:
    texts = TextBatch(
        batch, pad_token_id=parts.model.positions_skip_padding, dtype=parts.dtype, device=torch.device("cpu")
    )
    return parts.model.encode(texts).float()


def error_of(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Root mean square of what is between them, against that of the numbers."""
    return float((mine - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", WIDE)
def test_states_and_logits_are_near_those_of_float32(name: str, tmp_path: Path) -> None:
    """By hand: errors of 0.007 to 0.016, bfloat16 alone 0.005 to 0.007; 97 to 99 % of the tokens."""
    make_seq2seq(name, tmp_path, spread=0.1 if name == "marian" else 0.4, **WIDE[name])
    rng = random.Random(1)
    batch = [[rng.randrange(3, VOCABULARY - 1) for _ in range(rng.randrange(1, 50))] for _ in range(24)]
    exact, short = Seq2SeqParts(tmp_path), Seq2SeqParts(tmp_path, torch.bfloat16)
    rounded = [Seq2SeqParts(tmp_path, dtype, byte_product) for dtype in (torch.float32, torch.bfloat16)]
    with torch.inference_mode():
        expected = states(exact, batch)
        logits, of_bfloat16 = exact.model.logits(expected), error_of(states(short, batch), expected)
        assert logits.argmax(-1).unique().numel() > 20, "a weak test: always the same token"
        for parts in rounded:
            found = states(parts, batch)
            near = parts.model.logits(found.to(parts.dtype)).float()
            assert 0 < error_of(found, expected) < min(0.03, 3 * of_bfloat16)
            assert 0 < error_of(near, logits) < 0.03
            assert (near.argmax(-1) == logits.argmax(-1)).float().mean() > 0.95


def test_an_engine_searches_with_bytes(tmp_path: Path) -> None:
    """It finds translations that are about as likely as those of an engine in float32, and says what it holds."""
    nllb(tmp_path, spread=0.3, **WIDE["m2m100"])
    rng = random.Random(2)
    prompts = [
        {"prompt_token_ids": [rng.randrange(4, 60) for _ in range(length)], "decoder_prompt_token_ids": [2]}
        for length in (3, 9, 20, 31)
    ]
    params = SamplingParams(use_beam_search=True, beam_width=3, max_tokens=8)
    scores = []
    for settings in ({"quantization": "int8"}, {"dtype": "float32"}):
        with LLM(str(tmp_path), **settings) as llm:
            scores.append([output.outputs[0].score for output in llm.generate(prompts, params)])
            assert llm.engine.limits.weights == ("int8" if "quantization" in settings else "float32")
    assert scores[0] == pytest.approx(scores[1], rel=0.05)
    assert scores[0] != scores[1]


def resolved(folder: Path, **settings: Any) -> None:
    files = resolve(str(folder))
    resolve_seq2seq(EngineConfig(model=str(folder), **settings), load_seq2seq_config(files))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    make_seq2seq("m2m100", tmp_path, **WIDE["m2m100"])
    resolved(tmp_path, quantization="int8")
    for kind in ("int4", "gguf"):
        with pytest.raises(ConfigError, match="use 'int8'") as caught:
            resolved(tmp_path, quantization=kind)
        assert caught.value.field == "quantization"
    make_seq2seq("m2m100", tmp_path / "odd", decoder_ffn_dim=40)
    with pytest.raises(ConfigError, match="multiples of 16"):
        resolved(tmp_path / "odd", quantization="int8")
