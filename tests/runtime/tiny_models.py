"""Tiny models of every native family with random weights and a real tokenizer, and engines made from real parts.

The weights are drawn wide (`SPREAD`), so that attention is far from uniform: a wrong key or value in the cache changes
the tokens, which near-zero weights would hide.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from octavo.attention.triton import TritonAttention
from octavo.config import EngineConfig
from octavo.engine.blocks import BlockPool
from octavo.engine.core import EngineCore
from octavo.engine.scheduler import Scheduler
from octavo.execute.build import Resolved, attention_for, build_core, make_kv_cache, product_for, resolve_settings
from octavo.execute.context import KVCache
from octavo.execute.graphed_runner import GraphedRunner
from octavo.execute.graphs import CallAgain, StepGraphs
from octavo.execute.runner import Runner
from octavo.execute.table import RowTable
from octavo.models.cache import cache_dir
from octavo.models.config import ModelConfig, load_config
from octavo.models.llama_packed import CACHE_BLOCK as PACKED_BLOCK
from octavo.models.llama_packed import PackedLlama, ProgramAttention
from octavo.models.loader import load_model
from octavo.models.packed_weights import RECIPES, Packing, load_packed
from octavo.models.sources import resolve
from octavo.models.weights import open_weights
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

SPREAD = 0.25
VOCABULARY = 300
TEXT = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox runs on and on.",
    "In the beginning there was a block of keys and a block of values, and the table knew where they were.",
    "Numbers such as 1, 12, 123 and 1234 are written with digits. Words are written with letters.",
    "def add(left, right):\n    return left + right\n",
    "Ein Satz mit Umlauten: Übermut, Änderung, größer. Und ein Smiley: 🙂",
]


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of `VOCABULARY` tokens, trained here, with <s> and </s>; </s> ends a text."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _base(**changes: Any) -> dict[str, Any]:
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": None, "initializer_range": SPREAD, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    }  # fmt: skip
    return settings | changes


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2-mha": ("llama", _base(num_key_value_heads=4)),
    "llama-tied": ("llama", _base(tie_word_embeddings=True)),
    "llama-head-dim": ("llama", _base(head_dim=32)),
    "llama-bias": ("llama", _base(attention_bias=True, mlp_bias=True)),
    "llama3-rope": ("llama", _base(rope_parameters=LLAMA3)),
    "linear-rope": ("llama", _base(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})),
    "yarn-rope": ("llama", _base(rope_parameters=YARN)),
    "mistral-window": ("mistral", _base(sliding_window=24)),
    "qwen2": ("qwen2", _base()),
    "qwen2-window": ("qwen2", _base(use_sliding_window=True, sliding_window=16, max_window_layers=1)),
    "qwen3": ("qwen3", _base(head_dim=32, tie_word_embeddings=True)),
    "gqa-8-to-1": ("llama", _base(num_attention_heads=8, num_key_value_heads=1)),
}
"""Model type and configuration by name."""


def make_model(name: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a model of `FAMILIES` with its tokenizer into `folder`, float32, as safetensors. Biases and norms are
    random too: zeros and ones would hide that they are left out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = FAMILIES[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(settings | changes))).float()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("bias"):
                value.normal_(0.0, 0.5)
            elif "norm" in key:
                value.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


class Parts:
    """A loaded model, from which any number of cores with caches of any size are made."""

    def __init__(self, path: Path, dtype: torch.dtype, max_len: int = 512, *, deterministic: bool = False) -> None:
        self.path, self.dtype = path, dtype
        self.files = resolve(str(path))
        self.config: ModelConfig = load_config(self.files)
        self.device = torch.device("cpu")
        self.model: Any = load_model(
            self.files, self.config, load_format="auto", max_len=max_len, dtype=dtype, device=self.device,
            product=product_for(self.device, deterministic),
        )

    def core(
        self, *, num_blocks: int = 65, block_size: int = 16, max_num_seqs: int = 16, budget: int = 64, depth: int = 0,
        caching: bool = True, model: Any = None,
    ) -> EngineCore:  # fmt: skip
        """What `build_core` makes, around a model that is loaded already."""
        length = min((num_blocks - 1) * block_size, 512)
        resolved = Resolved(
            self.device, self.dtype, block_size, num_blocks, length, max_num_seqs, max(budget, max_num_seqs), depth
        )
        scheduler = Scheduler(
            BlockPool(num_blocks, block_size, caching=caching), max_num_seqs=max_num_seqs,
            max_num_batched_tokens=resolved.max_num_batched_tokens, clock=time.monotonic,
        )  # fmt: skip
        table = RowTable(max_num_seqs, length, block_size, self.config.vocab_size, self.device)
        kv = make_kv_cache(self.config, resolved)
        return EngineCore(scheduler, self._runner(resolved, kv, table, model), depth=depth)

    def _runner(self, resolved: Resolved, kv: KVCache, table: RowTable, model: Any) -> Runner:
        return Runner(model or self.model, kv, table, attention_for(self.device, self.dtype, self.config))


class PackedParts(Parts):
    """The same with the weights packed for the CPU's kernels. A program belongs to its cache, so each core has its own
    model; blocks are of 32 tokens."""

    def __init__(self, path: Path, packing: Packing = "file") -> None:
        self.path, self.packing, self.dtype, self.device = path, packing, torch.bfloat16, torch.device("cpu")
        self.files = resolve(str(path))
        self.config = load_config(self.files)

    def core(self, **settings: Any) -> EngineCore:
        return super().core(**(settings | {"block_size": PACKED_BLOCK}))

    def _runner(self, resolved: Resolved, kv: KVCache, table: RowTable, model: Any) -> Runner:
        with open_weights(self.files, self.config) as reader:
            weights = load_packed(reader, self.config, RECIPES[self.packing](reader))
        with torch.inference_mode():
            model = PackedLlama(
                self.config, weights, kv, max_len=512, max_tokens=resolved.max_num_batched_tokens,
                threads=torch.get_num_threads(), cache=cache_dir() / "kernels",
            )  # fmt: skip
        return Runner(model, kv, table, ProgramAttention())


class GraphedParts(Parts):
    """The way of a GPU, with its attention and recorded steps, on the CPU: recordings are functions called again.
    `undivided`: instead of the attention's own."""

    def __init__(self, path: Path, dtype: torch.dtype, undivided: Callable[[int], int] | None = None) -> None:
        super().__init__(path, dtype)
        self.undivided = undivided

    def _runner(self, resolved: Resolved, kv: KVCache, table: RowTable, model: Any) -> Runner:
        attention = TritonAttention(self.config.num_kv_heads)
        if self.undivided is not None:
            attention.undivided = self.undivided  # type: ignore[method-assign]
        graphs = StepGraphs(
            model or self.model, kv, table, attention, max_tokens=resolved.max_num_batched_tokens,
            hidden=self.config.hidden_size, dtype=self.dtype, recorder=CallAgain(),
        )  # fmt: skip
        graphs.capture()
        return GraphedRunner(model or self.model, kv, table, attention, graphs)


def parts_of(path: Path, kind: str) -> Parts:
    """With the same bits in every batch. `kind`: "float32", "bfloat16" or "packed"."""
    return PackedParts(path) if kind == "packed" else Parts(path, getattr(torch, kind), deterministic=True)


def core_of(path: Path, **settings: Any) -> EngineCore:
    """The core that `LLM(path, **settings)` would run, without a thread."""
    config = EngineConfig(model=str(path), **settings)
    files = resolve(config.model)
    model_config = load_config(files)
    return build_core(config, files, model_config, resolve_settings(config, files, model_config))[0]
