"""llama.cpp's part of `quality.py`, run by an interpreter that has llama-cpp-python.

    <interpreter> benchmarks/quality_llama_cpp.py MODEL.gguf < pieces.json

Reads pieces of token ids and prints, for every token but the first of each: its log-probability, and the most likely
token at its place. Weights are the bits of the file, as in `octavo` with `quantization="gguf"`.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def measure(model: str, pieces: list[list[int]]) -> dict[str, Any]:
    import numpy
    from llama_cpp import Llama

    llama = Llama(model, n_ctx=max(map(len, pieces)), n_batch=512, logits_all=True, verbose=False)
    logprobs: list[float] = []
    best: list[int] = []
    for ids in pieces:
        llama.reset()
        llama.eval(ids)
        scores = numpy.asarray(llama.scores[: len(ids) - 1], dtype=numpy.float64)
        top = scores.max(axis=1, keepdims=True)
        normal = scores - top - numpy.log(numpy.exp(scores - top).sum(axis=1, keepdims=True))
        logprobs += normal[numpy.arange(len(ids) - 1), ids[1:]].tolist()
        best += scores.argmax(axis=1).tolist()
    return {"logprobs": logprobs, "best": best, "first": {}}


if __name__ == "__main__":
    print("\n" + json.dumps(measure(sys.argv[1], json.load(sys.stdin))))
