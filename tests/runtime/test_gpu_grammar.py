"""Structured outputs on a machine with an NVIDIA GPU, where steps overlap and are replayed, and masks wait for the
tokens of the step before. Skipped elsewhere; `test_grammar.py` has what they promise."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from octavo import LLM, RequestOutput, SamplingParams, StructuredOutputsParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

PERSON = {
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"},
    "tags": {"type": "array", "items": {"enum": ["a", "bb", "ccc"]}}}, "required": ["name", "age", "tags"],
    "additionalProperties": False,
}  # fmt: skip
FORMS = {
    "regex": StructuredOutputsParams(regex=r"[0-9]{3}-(abc|xyz)+!"),
    "schema": StructuredOutputsParams(json=PERSON),
    "choice": StructuredOutputsParams(choice=["yes", "no", 'a "quoted" one']),
    "lark": StructuredOutputsParams(grammar='start: pair ("," pair)*\npair: /[a-z]/ "=" /[0-9]+/'),
}
WAYS: list[dict[str, Any]] = [
    {"temperature": 1.0}, {"temperature": 0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 30, "logprobs": 2},
    {"temperature": 1.2, "n": 3, "presence_penalty": 0.4},
]  # fmt: skip


def requests(forms: list[str | None], seed: int) -> tuple[list[str], list[SamplingParams]]:
    """One for each of `forms`, None being a request that may make anything."""
    prompts = [f"Example {n}" + " and another" * (n % 7) + ": " for n in range(len(forms))]
    params = [
        SamplingParams(
            **WAYS[(n + seed) % len(WAYS)], seed=seed + n, max_tokens=60,
            structured_outputs=None if form is None else FORMS[form],
        ) for n, form in enumerate(forms)
    ]  # fmt: skip
    return prompts, params


def check(form: str | None, text: str) -> None:
    if form == "schema":
        jsonschema.validate(json.loads(text), PERSON, cls=jsonschema.Draft202012Validator)
    elif form is not None:
        pattern = {"regex": r"[0-9]{3}-(abc|xyz)+!", "choice": 'yes|no|a "quoted" one',
                   "lark": "[a-z]=[0-9]+(,[a-z]=[0-9]+)*"}[form]  # fmt: skip
        assert re.fullmatch(pattern, text), (form, text)


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[made.token_ids for made in output.outputs] for output in outputs]


def test_outputs_keep_their_form_and_are_those_of_the_cpu(tiny_model: Path) -> None:
    """Alone, beside each other and beside requests without a form, whose tokens they do not touch. In float32, where
    products on another machine differ by less than a token can turn on."""
    forms: list[str | None] = [*FORMS, None] * 8
    prompts, params = requests(forms, seed=1)
    with LLM(str(tiny_model), dtype="float32") as llm:
        assert llm.engine.limits.device == "cuda"
        assert llm.engine.service.call(lambda core: core.depth) == 1
        outputs = llm.generate(prompts, params)
        for form, output in zip(forms, outputs, strict=True):
            for made in output.outputs:
                check(form, made.text)
                assert form is None or made.finish_reason == "stop"
        assert len({output.text for output in outputs}) > len(forms) / 2
        assert tokens(llm.generate(prompts, params)) == tokens(outputs)
        alone = [llm.generate(*request)[0] for request in zip(prompts[:12], params[:12], strict=True)]
        assert tokens(alone) == tokens(outputs[:12])
    with LLM(str(tiny_model), dtype="float32", device="cpu") as llm:
        assert tokens(llm.generate(prompts, params)) == tokens(outputs)
    with LLM(str(tiny_model), dtype="float32", num_blocks=30, max_num_seqs=12) as llm:
        assert tokens(llm.generate(prompts, params)) == tokens(outputs)
        assert llm.stats().preemptions > 0


def test_their_steps_are_replayed_and_overlap(tiny_model: Path) -> None:
    """With bfloat16, as it is used. A step waits for the tokens of the one before only to know its masks."""
    forms: list[str | None] = ["regex", "schema", None, None] * 10
    with LLM(str(tiny_model)) as llm:
        assert llm.engine.limits.dtype == "bfloat16"
        counts: Counter[str] = Counter()

        def watch(core: Any) -> None:
            graphs, launch = core.runner.graphs, core.runner.launch
            run = graphs._run
            graphs._run = lambda *arguments: (counts.update(["operators"]), run(*arguments))[1]

            def launched(plan: Any, masks: Any) -> Any:
                def asked() -> Any:
                    counts.update(["masked"])
                    counts["while a step ran"] += bool(core._under_way)
                    return masks()

                return launch(plan, asked)

            core.runner.launch = launched

        llm.engine.service.call(watch)
        prompts, params = requests(forms, seed=50)
        llm.generate(prompts, params)  # kernels are compiled, buffers are there
        llm.engine.service.call(lambda core: torch.cuda.set_sync_debug_mode("error"))
        try:
            outputs = llm.generate(prompts, params)
        finally:
            llm.engine.service.call(lambda core: torch.cuda.set_sync_debug_mode("default"))
        for form, output in zip(forms, outputs, strict=True):
            for made in output.outputs:
                check(form, made.text)
        assert counts["operators"] == 0, "not replayed"
        assert counts["while a step ran"] > counts["masked"] / 2 > 5
        assert llm.stats().blocks_used == 0
