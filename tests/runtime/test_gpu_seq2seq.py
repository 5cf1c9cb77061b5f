"""Encoder-decoders on a machine with an NVIDIA GPU: numbers and tokens as transformers has them on the CPU, in whatever
batch, whoever has read a source before. Skipped elsewhere; `test_seq2seq.py` and `test_translate.py` have the rest."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import tiny_translators as tiny
import torch
from logprob_paths import excess, rounded
from octavo import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from octavo.errors import UnsupportedModelError
from tiny_seq2seq import FAMILIES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

MADE = {"nllb": tiny.nllb, "m2m100": tiny.m2m100, "marian": tiny.marian}
TOLD: dict[str, dict[str, str]] = {
    "nllb": {"source": "en", "target": "fr"}, "m2m100": {"source": "en", "target": "fr"}, "marian": {},
}  # fmt: skip
TEXTS = ["The quick fox. It jumps!", "Numbers 12 and 1234", "dog", "x" * 40, "Où est la gare ?", " a  b ", *tiny.LINES]


def make(kind: str, folder: Path, **changes: Any) -> Any:
    """transformers' model, on the CPU; its files lie in `folder`. Marian forbids its padding, as what is published."""
    model = MADE[kind](folder, **changes)[0]
    if kind == "marian":
        model.generation_config.bad_words_ids = [[model.config.pad_token_id]]
        model.generation_config.save_pretrained(folder)
    return model


def sources(count: int, seed: int = 0, longest: int = 90) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(4, 150) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def asked(kind: str, source: list[int]) -> dict[str, Any]:
    """A source, and what an output begins with: NLLB's a language, here any token."""
    return {"prompt_token_ids": source} | ({"decoder_prompt_token_ids": [2, 77]} if kind == "nllb" else {})


def judged(peer: Any, output: RequestOutput) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each output what the engine and the peer give for its tokens, and all that the peer gives there. The peer
    reads the whole output in one pass."""
    found = []
    for made in output.outputs:
        assert made.logprobs is not None
        given = [entry[token].logprob for token, entry in zip(made.token_ids, made.logprobs, strict=True)]
        decoder = torch.tensor([output.prompt_token_ids + made.token_ids[:-1]], device=peer.device)
        source = torch.tensor([output.source_token_ids], device=peer.device)
        with torch.inference_mode():
            logits = peer(input_ids=source, decoder_input_ids=decoder).logits[0].float().cpu()
        logprobs = logits.log_softmax(-1)[len(output.prompt_token_ids) - 1 :]
        found.append((torch.tensor(given), logprobs.gather(1, torch.tensor(made.token_ids)[:, None])[:, 0], logprobs))
    return found


@pytest.mark.parametrize("kind", MADE)
def test_log_probabilities_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """Of greedy tokens, each of which is the peer's choice, and of tokens that are drawn."""
    peer = make(kind, tmp_path, spread=0.4)
    prompts = [asked(kind, source) for source in sources(60)]
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, "ignore_eos": True}, {"temperature": 1.0, "seed": 4, "n": 2},
        {"temperature": 0.9, "seed": 5, "top_p": 0.9, "top_k": 40},
    ]  # fmt: skip
    # padding amid an output has no position, so one pass would give what follows another one
    params = [SamplingParams(logit_bias={peer.config.pad_token_id: -100.0}, max_tokens=30, logprobs=1, **kind)
              for kind in kinds]  # fmt: skip
    with LLM(str(tmp_path), dtype="float32") as llm:
        assert llm.engine.limits.device == "cuda"
        assert llm.engine.service.call(lambda core: core.depth) == 1
        outputs = llm.generate(prompts, [params[number % 3] for number in range(60)])
        never = llm.engine.service.call(lambda core: core.runner.sampler._never)
    assert (never is not None) == (kind == "marian")
    drawn = set()
    for number, output in enumerate(outputs):
        for found, wanted, logprobs in judged(peer, output):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
            logprobs[:, peer.config.pad_token_id] = float("-inf")
            best = logprobs.max(dim=-1).values
            if number % 3 == 0:
                assert (best - wanted).max() < 1e-4
            drawn.add(bool((best > wanted).any()))
    assert drawn == {True, False}


def test_bfloat16_is_no_farther_from_float32_than_transformers_bfloat16(tmp_path: Path) -> None:
    """The measure of `test_gpu_accuracy.py`."""
    from transformers import AutoModelForSeq2SeqLM

    peer = make("nllb", tmp_path, spread=0.4).to(torch.bfloat16).cuda()
    reference = rounded(AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32).cuda(), torch.bfloat16)
    params = [SamplingParams(temperature=1.0, seed=n, max_tokens=40, logprobs=0, ignore_eos=True) for n in range(80)]
    with LLM(str(tmp_path)) as llm:
        assert llm.engine.limits.dtype == "bfloat16"
        outputs = llm.generate([asked("nllb", source) for source in sources(80, seed=3)], params)
    mine = torch.cat([found for output in outputs for found, _, _ in judged(peer, output)])
    theirs, wanted = (
        torch.cat([of for output in outputs for _, of, _ in judged(model, output)]) for model in (peer, reference)
    )
    distance, other, errors = excess(mine, theirs, wanted)
    print(f"{len(mine)} tokens, {distance:.4f}, transformers {other:.4f} ({errors:+.1f} errors)")
    assert len(mine) > 3000
    assert errors <= 3


SEARCHES: list[dict[str, Any]] = [
    {"beam_width": 4}, {"beam_width": 2, "n": 2}, {"beam_width": 5, "length_penalty": 2.0, "no_repeat_ngram_size": 2},
    {"beam_width": 4, "early_stopping": True, "repetition_penalty": 1.5}, {"beam_width": 1},
]  # fmt: skip
"""But for the width and `n`, as transformers calls them."""


@pytest.mark.parametrize("kind", MADE)
def test_searches_equal_transformers(kind: str, tmp_path: Path) -> None:
    """Alone and beside requests that draw tokens, in a pool that preempts."""
    peer = make(kind, tmp_path)
    end, batch = peer.config.eos_token_id, sources(30, seed=2, longest=50)
    for blocks, rows in ((2000, 256), (40, 24)):
        prompts, params = [], []
        for number, source in enumerate(batch):
            prompts += [asked(kind, source)] * 2
            params.append(SamplingParams(use_beam_search=True, max_tokens=20, **SEARCHES[number % len(SEARCHES)]))
            params.append(SamplingParams(max_tokens=20, n=2))
        with LLM(str(tmp_path), dtype="float32", num_blocks=blocks, max_num_seqs=rows) as llm:
            outputs = llm.generate(prompts, params)[::2]
            assert (llm.stats().preemptions > 0) == (blocks == 40)
            assert llm.stats().blocks_used == 0
        for number, (source, output) in enumerate(zip(batch, outputs, strict=True)):
            options = dict(SEARCHES[number % len(SEARCHES)])
            width, count = options.pop("beam_width"), options.pop("n", 1)
            begun = output.prompt_token_ids
            made = peer.generate(
                input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([begun]), max_new_tokens=20,
                num_beams=width, num_return_sequences=count, do_sample=False, forced_eos_token_id=None, **options,
            )[:, len(begun) :].tolist()  # fmt: skip
            expected = [row[: row.index(end) + 1] if end in row else row for row in made]
            assert [found.token_ids for found in output.outputs] == expected, (blocks, number)


def test_translations_are_those_of_the_cpu(tmp_path: Path) -> None:
    """Greedy, searched, drawn and under a grammar; whole texts through the public call."""
    for kind, told in TOLD.items():
        folder = tmp_path / kind
        folder.mkdir()
        make(kind, folder)
        ways: list[dict[str, Any]] = [
            {"max_tokens": 12}, {"max_tokens": 12, "beam_width": 4},
            {"sampling_params": SamplingParams(temperature=1.0, seed=3, top_p=0.9, max_tokens=12)},
            {"sampling_params": SamplingParams(temperature=1.2, seed=8, presence_penalty=0.5, max_tokens=12)},
            {"sampling_params": SamplingParams(
                temperature=1.0, seed=2, max_tokens=16, structured_outputs=StructuredOutputsParams(regex="[a-e]{3,7}"),
            )},
        ]  # fmt: skip
        with LLM(str(folder), dtype="float32") as gpu, LLM(str(folder), dtype="float32", device="cpu") as cpu:
            for way in ways:
                found, expected = (llm.translate(TEXTS, **told, **way) for llm in (gpu, cpu))
                assert [output.text for output in found] == [output.text for output in expected], (kind, way)
                assert len({output.text for output in found}) > len(TEXTS) / 2


def test_a_request_is_what_it_is_alone(tmp_path: Path) -> None:
    """Whoever shares its source, and when it is preempted. In float32, where products of other batches differ by less
    than a token can turn on."""
    make("nllb", tmp_path)
    prompts = [asked("nllb", source) for source in sources(8, seed=6)] * 3
    params = [SamplingParams(temperature=1.1, seed=number, n=2, max_tokens=20) for number in range(len(prompts))]

    def tokens(llm: LLM, *numbers: int) -> list[list[list[int]]]:
        outputs = llm.generate([prompts[number] for number in numbers], [params[number] for number in numbers])
        return [[made.token_ids for made in output.outputs] for output in outputs]

    everybody = range(len(prompts))
    with LLM(str(tmp_path), dtype="float32", enable_prefix_caching=False) as llm:
        alone = [tokens(llm, number)[0] for number in everybody]
    assert len({str(made) for made in alone}) == len(alone)
    with LLM(str(tmp_path), dtype="float32") as llm:
        assert tokens(llm, *everybody) == alone
        assert tokens(llm, *everybody) == alone, "from the cache"
    with LLM(str(tmp_path), dtype="float32", num_blocks=25, max_num_seqs=9) as llm:
        assert tokens(llm, *everybody) == alone
        assert llm.stats().preemptions > 0


def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    make("marian", tmp_path)
    kinds = [
        SamplingParams(temperature=0, max_tokens=12),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=1, max_tokens=12, logprobs=2, n=2),
        SamplingParams(use_beam_search=True, beam_width=4, max_tokens=12),
        SamplingParams(use_beam_search=True, beam_width=3, max_tokens=12, repetition_penalty=1.2),
    ]
    params = [kinds[number % 4] for number in range(40)]
    with LLM(str(tmp_path), enable_prefix_caching=False) as llm:
        prompts = [asked("marian", source) for source in sources(40)]
        llm.generate(prompts, params)  # kernels are compiled, buffers are there
        llm.engine.service.call(lambda core: torch.cuda.set_sync_debug_mode("error"))
        try:
            outputs = llm.generate(prompts, params)
        finally:
            llm.engine.service.call(lambda core: torch.cuda.set_sync_debug_mode("default"))
        assert all(made.finish_reason for output in outputs for made in output.outputs)


def test_no_kernel_is_compiled_for_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    make("nllb", tmp_path, max_position_embeddings=1200)
    with LLM(str(tmp_path)) as llm:
        compiled: list[str] = []
        original = JITFunction._do_compile
        monkeypatch.setattr(
            JITFunction, "_do_compile", lambda self, *args: (compiled.append(self.__name__), original(self, *args))[1]
        )
        kinds = [
            SamplingParams(temperature=0, max_tokens=8),
            SamplingParams(temperature=0.8, top_p=0.9, top_k=40, max_tokens=8, n=2, logprobs=2),
            SamplingParams(use_beam_search=True, beam_width=4, max_tokens=8),
            SamplingParams(max_tokens=8, structured_outputs=StructuredOutputsParams(regex="[a-c]{3,5}")),
        ]
        for count, longest in ((1, 20), (2, 90), (3, 1100), (16, 300), (70, 90), (290, 60), (40, 1100)):
            prompts = [asked("nllb", source) for source in sources(count, seed=count, longest=longest)]
            llm.generate(prompts, [kinds[n % len(kinds)] for n in range(count)])
        llm.translate(TEXTS, **TOLD["nllb"], max_tokens=5, beam_width=2)
        assert compiled == []


def test_close_gives_the_memory_back(tmp_path: Path) -> None:
    make("nllb", tmp_path)
    LLM(str(tmp_path)).close()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with LLM(str(tmp_path), kv_cache_memory=2**26) as llm:
            llm.translate("The fox.", **TOLD["nllb"], max_tokens=3, beam_width=2)
            assert torch.cuda.memory_allocated() > before + 2**25
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.parametrize("name", [name for name in FAMILIES if "t5" in name])
def test_what_has_no_kernel_yet_says_what_to_do(name: str, tmp_path: Path) -> None:
    tiny.t5(tmp_path, name=name)
    with pytest.raises(UnsupportedModelError, match="device='cpu'"):
        LLM(str(tmp_path))
    with LLM(str(tmp_path), device="cpu") as llm:
        assert llm.translate("The fox.", source="en", target="French", max_tokens=3)
