"""What do formats cost in quality? The default model as it runs by itself, in bfloat16, int8 and int4, against float32;
on a GPU in bfloat16, with an ordinary KV cache and with one of FP8, and deterministic.

    python benchmarks/quality.py [--kinds NAME ...] [--piece 500] [--python llama.cpp=PATH] [--json results.json]

Over a public-domain text (the Constitution of the United States) in pieces of 500 tokens: perplexity, the mean and root
mean square difference of a token's log-probability, and how often the most likely token is the same. And the two most
likely first tokens of the answer to one question that the model is unsure of. With the path of an interpreter that has
llama-cpp-python, the same of llama.cpp on the same file: does Octavo answer worse than it, on the same bits?
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import torch

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = Path(__file__).parent / "data" / "us-constitution.txt"
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"}, "default": {},
    "int8": {"quantization": "int8"}, "int4": {"quantization": "int4"},
    "fp8 cache": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    "determ.": {"dtype": "bfloat16", "deterministic": True},
}  # fmt: skip
ON_CPU, ON_GPU = ["bfloat16", "default", "int8", "int4"], ["bfloat16", "fp8 cache", "determ."]


def text_pieces(llm: Any, size: int) -> list[list[int]]:
    ids = llm.tokenizer.encode(TEXT.read_text())
    return [ids[start : start + size] for start in range(0, len(ids), size)]


def measure(settings: dict[str, Any], piece: int) -> dict[str, Any]:
    from octavo import LLM, SamplingParams

    with LLM(**settings) as llm:
        logprobs, best = [], []
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        for output in llm.generate(text_pieces(llm, piece), params):
            for token, entry in zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=True):
                assert entry is not None
                logprobs.append(entry[token].logprob)
                best.append(min(entry, key=lambda t: entry[t].rank))
        answer = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=1, logprobs=2))[0].outputs[0]
        first = sorted((answer.logprobs or [{}])[0].items(), key=lambda item: item[1].rank)[:2]
        firsts = {llm.tokenizer.decode([token]): round(entry.logprob, 2) for token, entry in first}
    return {"logprobs": logprobs, "best": best, "first": firsts}


def measure_llama_cpp(python: str, piece: int) -> dict[str, Any]:
    """The same pieces and the same file through llama.cpp, which gets the token ids that Octavo's tokenizer made."""
    from octavo import LLM
    from octavo.models.sources import DEFAULT_MODEL, resolve

    with LLM(dtype="bfloat16") as llm:
        pieces = text_pieces(llm, piece)
    command = [python, str(Path(__file__).with_name("quality_llama_cpp.py")), str(resolve(DEFAULT_MODEL).path)]
    done = subprocess.run(command, input=json.dumps(pieces), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{python} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", metavar="llama.cpp=PATH", help="an interpreter that has llama-cpp-python")
    others = [name for name in KINDS if name != "float32"]
    parser.add_argument("--kinds", nargs="+", choices=others, metavar="NAME", help=f"of {', '.join(others)}")
    parser.add_argument("--piece", type=int, default=500, help="tokens that are read at once")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    engine, _, path = (given.python or "llama.cpp=").partition("=")
    if engine != "llama.cpp":
        parser.error(f"--python {given.python}: only llama.cpp is measured here")
    kinds = given.kinds or (ON_GPU if torch.cuda.is_available() else ON_CPU)
    found = {kind: measure(KINDS[kind], given.piece) for kind in ("float32", *kinds)}
    if path:
        found["llama.cpp"] = measure_llama_cpp(path, given.piece)
    exact = found["float32"]
    count = len(exact["logprobs"])
    report = {}
    print(f"{count} tokens")
    print(f"{'':>10} {'perplexity':>10} {'mean diff.':>10} {'rms diff.':>10} {'same best':>10}   first tokens")
    for kind, one in found.items():
        differences = [a - b for a, b in zip(one["logprobs"], exact["logprobs"], strict=True)]
        report[kind] = {
            "perplexity": math.exp(-sum(one["logprobs"]) / count),
            "mean": sum(map(abs, differences)) / count,
            "rms": math.sqrt(sum(d * d for d in differences) / count),
            "same": sum(a == b for a, b in zip(one["best"], exact["best"], strict=True)) / count,
            "first": one["first"],
        }
        row = report[kind]
        print(f"{kind:>10} {row['perplexity']:10.3f} {row['mean']:10.4f} {row['rms']:10.4f}", end=" ")
        print(f"{row['same']:10.1%}   {row['first']}")
    if given.json:
        given.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
