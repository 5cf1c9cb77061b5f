"""A GGUF file of a given shape with random weights in Q4_0, to measure speed at sizes of which no model is at hand.

    python benchmarks/random_gguf.py FOLDER TARGET.gguf

FOLDER has the `config.json` of a Qwen2, Qwen3, Llama or Mistral model. Blocks are random bytes with one small scale:
nothing is quantised, so it takes seconds. The tokenizer has the right number of tokens and knows bytes; no more.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy

SCALE = 0.004
"""4.6 times this is the deviation of a weight: about that of a model before training, so activations stay finite."""
KINDS = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama", "mistral": "llama"}


def blocks(rows: int, columns: int, source: numpy.random.Generator) -> numpy.ndarray[Any, Any]:
    """Rows of Q4_0: for each 32 values a scale in float16, then 16 bytes of two values each."""
    data = source.integers(0, 256, (rows, columns // 32, 18), dtype=numpy.uint8)
    data[:, :, :2] = numpy.array([SCALE], dtype=numpy.float16).view(numpy.uint8)
    return data.reshape(rows, columns // 32 * 18)


def byte_characters() -> list[str]:
    """The printable stand-ins that byte-level tokenizers have for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return [chr(byte) for byte in printable] + [chr(256 + place) for place, _ in enumerate(others)]


def write(config: dict[str, Any], target: Path) -> None:
    kind = KINDS[config["model_type"]]
    width, inner, layers = (config[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads, vocabulary = config["num_attention_heads"], config["vocab_size"]
    groups = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or width // heads
    rope = config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta", 10000.0)

    writer = gguf.GGUFWriter(target, kind)
    writer.add_name("random")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe" if kind == "llama" else "qwen2")
    known = [*byte_characters(), "ab"]
    writer.add_token_list([*known, *(f"<t{number}>" for number in range(vocabulary - len(known)))])
    writer.add_token_types([gguf.TokenType.NORMAL] * (vocabulary - 2) + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(vocabulary - 2)
    writer.add_eos_token_id(vocabulary - 1)
    writer.add_add_bos_token(False)

    source = numpy.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        data = blocks(rows, columns, source)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def vector(name: str, size: int, value: float) -> None:
        writer.add_tensor(name, numpy.full(size, value, dtype=numpy.float32))

    matrix("token_embd", vocabulary, width)
    vector("output_norm.weight", width, 1.0)
    if not config.get("tie_word_embeddings"):
        matrix("output", vocabulary, width)
    for layer in range(layers):
        at = f"blk.{layer}"
        vector(f"{at}.attn_norm.weight", width, 1.0)
        vector(f"{at}.ffn_norm.weight", width, 1.0)
        for name, rows in (("q", heads * head), ("k", groups * head), ("v", groups * head)):
            matrix(f"{at}.attn_{name}", rows, width)
            if kind == "qwen2":
                vector(f"{at}.attn_{name}.bias", rows, 0.0)
        if kind == "qwen3":
            vector(f"{at}.attn_q_norm.weight", head, 1.0)
            vector(f"{at}.attn_k_norm.weight", head, 1.0)
        matrix(f"{at}.attn_output", width, heads * head)
        matrix(f"{at}.ffn_gate", inner, width)
        matrix(f"{at}.ffn_up", inner, width)
        matrix(f"{at}.ffn_down", width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(json.loads((Path(sys.argv[1]) / "config.json").read_text()), Path(sys.argv[2]))
