"""Which library for grammars: time to compile a JSON schema and time for a mask, llguidance beside xgrammar where that
is installed. Both walk the same random texts over the default model's vocabulary, on one thread.

    python benchmarks/grammar.py            prints a table; `pip install xgrammar` for its column
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from octavo.decode.grammar import Grammars
from octavo.models.sources import DEFAULT_MODEL, resolve
from octavo.structured_outputs import StructuredOutputsParams
from octavo.tokenizer import Tokenizer, load_tokenizer

PERSON = {
    "type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array",
    "items": {"enum": ["a", "b", "c"]}}}, "required": ["name", "age", "tags"], "additionalProperties": False,
}  # fmt: skip
SCHEMAS = {
    "person": PERSON,
    "list of 40 kinds of objects": {
        "type": "array", "items": {"anyOf": [{**PERSON, "properties": {**PERSON["properties"], f"k{n}": PERSON}}
                                             for n in range(40)]},
    },
    "patterns": {
        "type": "object", "required": ["mail", "text"], "additionalProperties": False,
        "properties": {"mail": {"type": "string", "pattern": "^[a-z.]+@[a-z]+\\.[a-z]{2,3}$"},
                       "text": {"type": "string", "maxLength": 200}},
    },
}  # fmt: skip
STEPS = 150
Walk = Callable[[Sequence[float]], tuple[float, list[float]]]


def allowed_of(mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def llguidance_walk(grammars: Grammars, schema: Any) -> Walk:
    def walk(choices: Sequence[float]) -> tuple[float, list[float]]:
        begin = time.perf_counter()
        constraint = grammars.compile(StructuredOutputsParams(json={**schema, "title": str(choices[0])})).start()
        compiled, masks = time.perf_counter() - begin, []
        for choice in choices:
            begin = time.perf_counter()
            mask = constraint.allowed(1 << 20)
            masks.append(time.perf_counter() - begin)
            tokens = allowed_of(mask)
            if constraint.accept(int(tokens[int(choice * len(tokens))])):
                break
        return compiled, masks

    return walk


def xgrammar_walk(tokenizer: Tokenizer, vocab_size: int, schema: Any) -> Walk:
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer.hf, vocab_size=vocab_size)

    def walk(choices: Sequence[float]) -> tuple[float, list[float]]:
        compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        begin = time.perf_counter()
        text = json.dumps({**schema, "title": str(choices[0])})
        matcher = xgrammar.GrammarMatcher(compiler.compile_json_schema(text, any_whitespace=False))
        compiled, masks = time.perf_counter() - begin, []
        bits = xgrammar.allocate_token_bitmask(1, vocab_size)
        for choice in choices:
            begin = time.perf_counter()
            matcher.fill_next_token_bitmask(bits)
            masks.append(time.perf_counter() - begin)
            tokens = allowed_of(bits[0].numpy())
            if not matcher.accept_token(int(tokens[int(choice * len(tokens))])) or matcher.is_terminated():
                break
        return compiled, masks

    return walk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds: int = parser.parse_args().rounds
    tokenizer = load_tokenizer(resolve(DEFAULT_MODEL))
    size = tokenizer.vocab_size
    grammars = Grammars(tokenizer, size, tokenizer.eos_token_ids)
    begin = time.perf_counter()
    grammars.compile(StructuredOutputsParams(choice=["a"]))
    print(f"llguidance: the vocabulary of {size} tokens, once: {time.perf_counter() - begin:.2f} s")
    print(f"{'':40} {'compile, ms':>12} {'mask, us: median':>18} {'99 %':>8} {'most':>8}")
    for name, schema in SCHEMAS.items():
        walks = {"llguidance": llguidance_walk(grammars, schema)}
        with suppress(ImportError):
            walks["xgrammar"] = xgrammar_walk(tokenizer, size, schema)
        for library, walk in walks.items():
            random.seed(0)
            runs = [walk([random.random() for _ in range(STEPS)]) for _ in range(rounds)]
            masks = sorted(1e6 * mask for _, some in runs for mask in some)
            compiled = statistics.median(1e3 * seconds for seconds, _ in runs)
            row = f"{statistics.median(masks):18.0f} {masks[int(0.99 * len(masks))]:8.0f} {masks[-1]:8.0f}"
            print(f"{name + ', ' + library:40} {compiled:12.1f} {row}")


if __name__ == "__main__":
    main()
