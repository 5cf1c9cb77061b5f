"""Octavo computes what transformers computes: logits within 1e-4 in float32, and the same greedy tokens.

The reference sees prompt and output in one pass without a cache, so each of the 64 tokens is compared to the choice it
makes after the same tokens: equal everywhere means that its own greedy search would have made them. A few prompts also
run through its `generate`.

On the default model, whose logits reach 30, transformers in float32 differs from itself by up to 2e-4 between its own
attention implementations, and from itself in float64 by more than 1e-4 on some texts. Where Octavo is further than 1e-4
from it, the float64 model decides who is right: Octavo must be within 1e-4 of it, or at least as near as transformers.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from core_driver import Driver, stacked_logits
from octavo import LLM, SamplingParams
from tiny_models import FAMILIES, VOCABULARY, Parts, make_model

TOLERANCE = 1e-4
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)

QUESTIONS = [
    "What is the capital of France?", "Write a haiku about the sea.", "Explain what a hash table is.",
    "Count from 1 to 20.", "What is 12 * 34?", "Name three primary colours.", "Who wrote Hamlet?",
    "Translate 'good morning' into French.", "Give me a recipe for pancakes.", "Why is the sky blue?",
    "Write a Python function that reverses a list.", "What happened in 1969?", "Describe a cat in one sentence.",
    "How many days are in February 2024?", "What is the boiling point of water in Fahrenheit?",
    "List the planets of the solar system.", "Tell me a joke.", "What is photosynthesis?",
    "Summarise the plot of Romeo and Juliet.", "What does HTTP stand for?", "Convert 100 miles to kilometres.",
    "Who was the first person on the Moon?", "What is a prime number?", "Write a limerick about a dog.",
    "How do I boil an egg?",
]  # fmt: skip
BEGINNINGS = [
    "The quick brown fox", "In 1815, at Waterloo,", "def fibonacci(n):\n    ", "Once upon a time", "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\n", "SELECT name FROM", "The mitochondria is", "Übermut tut selten", "日本の首都は",
    "import numpy as np\n", "To be, or not to be:", "<html>\n<head>", "Q: Why?\nA:", "The year 2024 was", "E = mc",
    "It was the best of times, it was", "Ingredients:\n- 2 eggs\n- 100 g flour\n", "A B C D E F", "Привет, мир",
    "if (x > 0) {", "According to the report,", "The three laws of robotics", "My favourite book", "0.1 + 0.2 =",
]  # fmt: skip


@pytest.fixture(scope="module")
def reference(default_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        default_model.parent, gguf_file=default_model.name, dtype=torch.float32
    )
    model.generation_config.eos_token_id = None
    return model.eval()


def logits_of(model: Any, prompt: list[int], output: list[int]) -> torch.Tensor:
    """[output, V]: what the model says before each token of the output."""
    with torch.inference_mode():
        return model(torch.tensor([prompt + output[:-1]]), use_cache=False, logits_to_keep=len(output)).logits[0]


def agree(model: Any, prompts: list[list[int]], outputs: list[list[int]], logits: list[torch.Tensor]) -> list[int]:
    """Compare tokens and logits with the model of transformers; returns the prompts whose logits are further apart."""
    apart = []
    for number, (prompt, output, ours) in enumerate(zip(prompts, outputs, logits, strict=True)):
        theirs = logits_of(model, prompt, output)
        assert theirs.argmax(dim=-1).tolist() == output
        if (ours - theirs).abs().max().item() > TOLERANCE:
            apart.append(number)
    return apart


def nearer(model: Any, prompt: list[int], output: list[int], ours: torch.Tensor) -> bool:
    """By the model in float64: Octavo is within the tolerance, or at least as near as transformers' float32."""
    theirs = logits_of(model, prompt, output)
    exact = logits_of(torch.nn.Module.double(model), prompt, output)
    torch.nn.Module.float(model)  # the same weights again: they were float32. (Its own `float` refuses a GGUF model)
    error, their_error = ((some - exact).abs().max().item() for some in (ours, theirs))
    return error <= max(TOLERANCE, their_error)


@pytest.mark.slow
def test_the_default_model_over_50_prompts_of_64_tokens(default_model: Path, reference: Any) -> None:
    parts = Parts(default_model, torch.float32)
    with LLM(str(default_model), load_format="dummy", num_blocks=64) as llm:  # for its tokenizer
        chats = [llm.chat_prompt([{"role": "user", "content": text}], {})["prompt"] for text in QUESTIONS]
        prompts = [llm.tokenizer.encode(text, add_special_tokens=False) for text in chats + BEGINNINGS]
    assert len(prompts) == 50
    for some in (prompts[:25], prompts[25:]):
        driver = Driver(parts.core(num_blocks=200, block_size=32, max_num_seqs=32, budget=256), record=True)
        outputs = driver.generate(some, GREEDY)
        assert [len(output) for output in outputs] == [64] * 25
        logits = stacked_logits(driver)
        apart = agree(reference, some, outputs, logits)
        assert len(apart) <= 3
        for number in apart:
            assert nearer(reference, some[number], outputs[number], logits[number])


@pytest.mark.slow
def test_the_default_model_against_generate(default_model: Path, reference: Any) -> None:
    """The public way: `LLM.generate` from token ids, against `model.generate`."""
    with LLM(str(default_model), dtype="float32", num_blocks=64) as llm:
        prompts = [llm.tokenizer.encode(text) for text in (BEGINNINGS[0], BEGINNINGS[5])]
        ours = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    for prompt, output in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64)
        assert theirs[0, len(prompt) :].tolist() == output


@pytest.mark.parametrize("name", FAMILIES)
def test_every_native_family_over_50_prompts_of_64_tokens(name: str, tmp_path: Path) -> None:
    """Prompts of 1 to 120 tokens in one batch, in chunks, in blocks of 16; windows are shorter than the texts."""
    from transformers import AutoModelForCausalLM

    make_model(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    rng = random.Random(name)
    lengths = [1, 2, 15, 16, 17, 120, *(rng.randint(1, 120) for _ in range(44))]
    prompts = [[rng.randrange(2, VOCABULARY) for _ in range(length)] for length in lengths]
    driver = Driver(Parts(tmp_path, torch.float32).core(num_blocks=320, max_num_seqs=24, budget=100), record=True)
    outputs = driver.generate(prompts, GREEDY)
    assert [len(output) for output in outputs] == [64] * 50
    assert len({token for output in outputs for token in output}) > 30, "the model says always the same: a weak test"
    assert agree(model, prompts, outputs, stacked_logits(driver)) == []


def test_the_tiny_model_against_generate_through_the_public_way(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    prompts = [[5 + i, 40, 17 * i % 300, 9] for i in range(50)]
    with LLM(str(tiny_model), dtype="float32") as llm:
        ours = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    ids = torch.tensor(prompts)
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64)
    assert theirs[:, 4:].tolist() == ours
