"""What `kernels.py` times: every operator of `octavo_kernels` at shapes of real models, as calls ready to be made.

A case says which bytes must move and which products must be done at least, so that its time has a limit. Inputs that a
model does not find in the L2 cache (weights, keys and values: the next layer brings its own) come in as many copies as
exceed `Plan.cold` bytes, and a case's `calls` each take another one. What a model does find there, since the kernel
before has just written it (activations, logits), is one and the same tensor in all calls.

`FULL` are the sizes that are measured, `TINY` those at which tests run the same code on a CPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from octavo.attention.triton import TritonAttention
from octavo.models.config import ModelConfig, parse_config, read_json
from octavo_kernels import (
    draw_tokens,
    enter_blocks,
    find_broken,
    forbid_tokens,
    fused_add_rms_norm,
    gumbel_sample,
    invariant_linear,
    paged_attention,
    prepare_rope,
    rope_and_cache,
    row_linear,
    silu_and_mul,
    step_inputs,
    tiles,
    top_k_top_p_min_p,
)

SHAPES = Path(__file__).parent / "shapes"
BLOCK = 16
ITEM = 2  # bytes of a bfloat16


@dataclass(frozen=True)
class Shape:
    """Of a model: heads, KV heads, head size, hidden and inner size."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    qkv_bias: bool = False


@dataclass(frozen=True)
class Plan:
    """Sizes of the cases."""

    shapes: tuple[Shape, ...]
    """Of the row-wise kernels."""
    attending: tuple[Shape, ...]
    products: tuple[Shape, ...]
    tokens: tuple[int, ...]
    contexts: dict[str, list[tuple[int, int]]]
    """Attention: (new tokens, tokens in all) of each sequence."""
    batches: tuple[int, ...]
    """Sequences that decode, of mixed lengths."""
    lengths: tuple[int, int]
    window: int
    sharing: tuple[int, int, int]
    """Sequences, tokens that they share, tokens of each in all."""
    rows: tuple[int, ...]
    """Of cuBLAS's products."""
    vocabularies: tuple[int, ...]
    cold: int
    """Bytes of copies that no cache holds; 0: two copies, for a test."""


@dataclass(frozen=True)
class Case:
    """One figure. `size` in bytes, `operations` of products; `calls` do the same with other copies of cold inputs."""

    kernel: str
    shape: str
    calls: Sequence[Callable[[], object]]
    size: float
    operations: float = 0.0


def shape_of(name: str) -> Shape:
    config: ModelConfig = parse_config(read_json(SHAPES / name / "config.json"))
    return Shape(
        name, config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size, config.intermediate_size,
        config.qkv_bias,
    )  # fmt: skip


SMALL, LARGE = Shape("0.6B", 16, 8, 128, 1024, 3072), Shape("8B", 32, 8, 128, 4096, 14336)
FULL = Plan(
    shapes=(SMALL, LARGE, Shape("70B", 64, 8, 128, 8192, 28672)),
    attending=(SMALL, LARGE),
    products=tuple(shape_of(name) for name in ("qwen3-0.6b", "qwen2-1.5b", "llama3-8b")),
    tokens=(1, 64, 8192),
    contexts={
        "decode B=1 ctx=2048": [(1, 2048)], "decode B=1 ctx=32768": [(1, 32768)],
        "decode B=64 ctx=2048": [(1, 2048)] * 64, "decode B=256 ctx=1024": [(1, 1024)] * 256,
        "decode B=32 mixed ctx 64..8192": [(1, 64 + 262 * i) for i in range(32)],
        "speculate n=5 B=16 ctx=4096": [(5, 4096)] * 16,
        "prefill 1x2048": [(2048, 2048)], "prefill 1x8192": [(8192, 8192)],
        "chunk 512 on ctx=8192": [(512, 8192)], "prefill 1024 + 63 decode": [(1024, 1024)] + [(1, 2048)] * 63,
    },
    batches=(1, 64, 128, 256), lengths=(150, 1100), window=512, sharing=(128, 2048, 2144),
    rows=(1, 16, 64, 128, 256), vocabularies=(32000, 151936), cold=200_000_000,
)  # fmt: skip
_TOY = Shape("toy", 4, 2, 16, 64, 96, qkv_bias=True)
TINY = Plan(
    shapes=(_TOY,), attending=(_TOY,), products=(_TOY,), tokens=(1, 3),
    contexts={"decode": [(1, 20), (1, 40)], "prefill": [(20, 20)], "mixed": [(5, 20), (1, 30)]},
    batches=(1, 5), lengths=(10, 50), window=8, sharing=(3, 256, 270), rows=(1, 3), vocabularies=(3000,), cold=0,
)  # fmt: skip


class Cases:
    """All cases on one device, made one after the other: nothing keeps the inputs of a case that was left."""

    def __init__(self, plan: Plan, device: torch.device, only: str = "") -> None:
        self.plan, self.device, self.only = plan, device, only

    def __iter__(self) -> Iterator[Case]:
        parts: tuple[tuple[tuple[str, ...], Callable[[], Iterator[Case]]], ...] = (
            (("fused_add_rms_norm", "silu_and_mul", "rope_and_cache"), self.layers),
            (("row_linear", "F.linear", "invariant_linear"), self.products),
            (("step_inputs", "enter_blocks", "find_broken"), self.steps),
            (("gumbel_sample", "draw_tokens", "top_k_top_p_min_p", "forbid_tokens"), self.sampling),
            (("paged_attention",), self.decoding),
            (("paged_attention",), self.sharing),
            (("paged_attention",), self.attention),
        )
        for kernels, part in parts:
            if any(self.only in kernel for kernel in kernels):
                yield from (case for case in part() if self.only in case.kernel)

    # ---------------------------------------------------------------- inputs

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def ints(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def copies(self, size: float) -> range:
        """As many as exceed what a cache holds, each of `size` bytes. A hundred do for the smallest: between two uses
        of one other copies and the rest of the call pass through."""
        return range(min(100, -(-self.plan.cold // max(1, int(size))) + 1) if self.plan.cold else 2)

    # ---------------------------------------------------------------- row by row

    def layers(self) -> Iterator[Case]:
        for model in self.plan.shapes:
            heads, kv_heads, size = model.heads, model.kv_heads, model.head_dim
            for tokens in self.plan.tokens:
                shape = f"{model.name} T={tokens}"
                x, residual = self.random(tokens, model.hidden), self.random(tokens, model.hidden)
                weight, out = self.random(model.hidden), torch.empty_like(x)
                norm = partial(fused_add_rms_norm, x, residual, weight, 1e-6, out)
                yield Case("fused_add_rms_norm", shape, [norm], 4 * ITEM * x.numel())
                gated = self.random(tokens, 2 * model.inner)
                half = torch.empty(tokens, model.inner, dtype=gated.dtype, device=self.device)
                yield Case("silu_and_mul", shape, [partial(silu_and_mul, gated, half)], 3 * ITEM * half.numel())
                qkv = self.random(tokens, (heads + 2 * kv_heads) * size)
                slots = torch.arange(tokens, device=self.device)
                angles, weight = self.random(tokens, size, dtype=torch.float32), self.random(size)
                q = torch.empty(tokens, heads, size, dtype=qkv.dtype, device=self.device)
                blocks, calls = tokens // BLOCK + 1, []
                for _ in self.copies(2 * ITEM * blocks * kv_heads * BLOCK * size):
                    keys, values = self.random(2, blocks, kv_heads, BLOCK, size)
                    step = prepare_rope(angles, slots, slots, keys)
                    calls.append(
                        partial(
                            rope_and_cache, qkv, angles, slots, slots, keys, values, heads, kv_heads, q_norm=weight,
                            k_norm=weight, out=q, step=step,
                        )
                    )  # fmt: skip
                yield Case("rope_and_cache", shape, calls, 2 * ITEM * qkv.numel() + 4 * angles.numel())

    def products(self) -> Iterator[Case]:
        """The four products of a layer as `models/llama.py` has them in a step of one token, beside the plain ones of
        the vendor's library."""
        for model in self.plan.products:
            q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
            # outputs, inputs, normed before, gated after, added to the residual stream after
            kinds = {
                "qkv": (q + 2 * kv, model.hidden, True, False, False), "out": (model.hidden, q, False, False, True),
                "gate_up": (2 * model.inner, model.hidden, True, True, False),
                "down": (model.hidden, model.inner, False, False, True),
            }  # fmt: skip
            for name, (outputs, inputs, normed, gated, added) in kinds.items():
                size = ITEM * outputs * inputs
                weights = [self.random(outputs, inputs) * inputs**-0.5 for _ in self.copies(size)]
                x, made = self.random(1, inputs), outputs // 2 if gated else outputs
                bias = self.random(outputs) if name == "qkv" and model.qkv_bias else None
                norm, residual = self.random(inputs) if normed else None, self.random(1, made) if added else None
                shape = f"{model.name} {name} {inputs} -> {outputs}"
                calls: list[Callable[[], object]] = [
                    partial(row_linear, x, weight, bias, norm=norm, eps=1e-6, gated=gated, residual=residual)
                    for weight in weights
                ]
                around = inputs * (1 + normed) + made * (1 + added) + (outputs if bias is not None else 0)
                yield Case("row_linear", shape, calls, size + ITEM * around, 2.0 * outputs * inputs)
                for rows in self.plan.rows:
                    many = self.random(rows, inputs)
                    calls = [partial(F.linear, many, weight, bias) for weight in weights]
                    moved, operations = size + ITEM * rows * (inputs + outputs), 2.0 * rows * outputs * inputs
                    yield Case("F.linear", f"{shape} rows={rows}", calls, moved, operations)
                    calls = [partial(invariant_linear, many, weight, bias) for weight in weights]
                    yield Case("invariant_linear", f"{shape} rows={rows}", calls, moved, operations)

    def steps(self) -> Iterator[Case]:
        """Of a step of decoding. The table of token ids is read in one place a row, so it is always cold."""
        tokens = torch.zeros(max(self.plan.batches), 16 * self.plan.lengths[1], dtype=torch.int32, device=self.device)
        table = torch.zeros(tokens.shape[0], self.plan.lengths[1], dtype=torch.int32, device=self.device)
        for batch in self.plan.batches:
            rows, starts = self.ints(range(batch)), self.ints([self.plan.lengths[0]] * batch)
            bounds, shape = self.ints(range(batch + 1)), f"B={batch}"
            call = partial(step_inputs, rows, starts, bounds, tokens, table, BLOCK, total=batch)
            yield Case("step_inputs", shape, [call], 40 * batch)
            yield Case("enter_blocks", shape, [partial(enter_blocks, table, rows, starts, rows)], 16 * batch)
            for model in self.plan.attending:
                states, out = self.random(batch, model.hidden), torch.empty_like(rows)
                broken = partial(find_broken, states, bounds, out)
                yield Case("find_broken", f"{model.name} {shape}", [broken], ITEM * states.numel() + 4 * batch)

    # ---------------------------------------------------------------- sampling

    def sampling(self) -> Iterator[Case]:
        for batch in self.plan.batches:
            for vocab in self.plan.vocabularies:
                # a few likely tokens over a broad floor, about as models have it: top-p 0.9 keeps some dozens
                logits, shape = self.random(batch, vocab, dtype=torch.float32) * 2, f"B={batch} V={vocab}"
                logits[:, :100] += torch.linspace(14, 4, 100, device=self.device)
                half, longs = logits.bfloat16(), torch.arange(batch, device=self.device)
                ones, zeros = torch.ones(batch, device=self.device), torch.zeros(batch, device=self.device)
                off, rows = self.ints([0] * batch), self.ints(range(batch))
                tokens = torch.zeros(batch, 64, dtype=torch.int32, device=self.device)
                for label, heat in (("greedy", zeros), ("T=1", ones)):
                    sample = partial(gumbel_sample, logits, heat, longs, longs)
                    yield Case("gumbel_sample", f"{shape} {label}", [sample], 4 * logits.numel())
                    draw = partial(draw_tokens, half, rows, off, heat, longs, tokens)
                    yield Case("draw_tokens", f"{shape} {label}", [draw], ITEM * logits.numel())
                # The filter works in place; what it kept once it keeps again, so that each call starts from a copy.
                work = torch.empty_like(logits)
                draw = partial(draw_tokens, work, rows, off, ones, longs, tokens)
                for label, k, p in (("copy only", None, 1.0), ("top-k 50", 50, 1.0), ("top-p 0.9", 0, 0.9),
                                    ("top-k 50, top-p 0.9", 50, 0.9)):  # fmt: skip
                    settings = None if k is None else (ones, off + k, ones * p, zeros)
                    call = partial(_copy_and_filter, logits, work, settings)
                    yield Case("top_k_top_p_min_p", f"{shape} {label}", [call], 16 * logits.numel())
                filtered = partial(_copy_and_filter, logits, work, (ones, off + 50, ones * 0.9, zeros), draw)
                label = "after a copy and top-k 50, top-p 0.9"
                yield Case("draw_tokens", f"{shape} {label}", [filtered], 20 * logits.numel())
                words = torch.zeros(batch, -(-vocab // 32), dtype=torch.int32, device=self.device)  # forbid all
                forbid = partial(forbid_tokens, work, longs, words)
                yield Case("forbid_tokens", f"{shape} all", [forbid], 4 * (work.numel() + words.numel()))

    # ---------------------------------------------------------------- attention

    def attention(self) -> Iterator[Case]:
        for model in self.plan.attending:
            for label, sequences in self.plan.contexts.items():
                yield self.attend(model, label, sequences)

    def decoding(self) -> Iterator[Case]:
        for model in self.plan.attending:
            for batch in self.plan.batches:
                source = random.Random(batch)
                sequences = [(1, source.randint(*self.plan.lengths)) for _ in range(batch)]
                label = f"decode B={batch} ctx {self.plan.lengths[0]}..{self.plan.lengths[1]}"
                yield self.attend(model, label, sequences)
                yield self.attend(model, f"{label} window", sequences, window=self.plan.window)
                yield self.attend(model, f"{label} soft cap", sequences, soft_cap=50.0)
                yield self.attend(model, f"{label} ALiBi", sequences, alibi=True)
                yield self.attend(model, f"{label} invariant", sequences, invariant=True)
                if self.device.type == "cpu" or torch.cuda.get_device_capability(self.device) >= (8, 9):
                    yield self.attend(model, f"{label} FP8", sequences, fp8=True)

    def sharing(self) -> Iterator[Case]:
        batch, shared, length = self.plan.sharing
        for model in self.plan.attending:
            label = f"decode B={batch} sharing {shared} of {length}"
            yield self.attend(model, label, [(1, length)] * batch, shared=shared)
            yield self.attend(model, f"{label}, as if not", [(1, length)] * batch, shared=shared, known=False)

    def attend(
        self, model: Shape, label: str, sequences: Sequence[tuple[int, int]], *, window: int = 0,
        soft_cap: float = 0.0, shared: int = 0, known: bool = True, alibi: bool = False, invariant: bool = False,
        fp8: bool = False,
    ) -> Case:  # fmt: skip
        """`shared` tokens of all sequences lie in the same blocks; the kernel is told so if `known`."""
        heads, kv_heads, size = model.heads, model.kv_heads, model.head_dim
        counts, lengths, common = [c for c, _ in sequences], [n for _, n in sequences], shared // BLOCK
        own = [-(-n // BLOCK) - common for n in lengths]
        order = (torch.randperm(sum(own), dtype=torch.int32) + common).split(own)
        table = torch.zeros(len(lengths), common + max(own), dtype=torch.int32)
        table[:, :common] = torch.arange(common, dtype=torch.int32)
        for row, blocks in zip(table, order, strict=True):
            row[common : common + len(blocks)] = blocks
        table, ends = table.to(self.device), self.ints(lengths)
        starts = self.ints([0, *counts]).cumsum(0).to(torch.int32)
        q = self.random(sum(counts), heads, size)
        out = torch.empty_like(q)
        backend = TritonAttention(kv_heads, invariant_to=max(lengths) if invariant else 0)
        item = 1 if fp8 else ITEM
        seen = [min(n, window + c - 1) if window else n for c, n in sequences]
        size_kv = 2 * item * kv_heads * size * (shared + sum(n - shared for n in seen))
        options = {
            "max_query_len": max(counts), "max_seq_len": max(lengths), "scale": size**-0.5, "window": window,
            "soft_cap": soft_cap, "min_split": tiles.MIN_SPLIT if shared else backend.min_split(len(lengths)),
            "out": out, "invariant": invariant,
            "alibi_slopes": torch.linspace(0.5, 0.01, heads, device=self.device) if alibi else None,
            "kv_scales": torch.ones(2, kv_heads, device=self.device) if fp8 else None,
            "shared_splits": self.ints([shared // tiles.MIN_SPLIT]) if shared and known else None,
        }  # fmt: skip
        calls = []
        for _ in self.copies(size_kv):
            keys, values = self.random(2, common + sum(own), kv_heads, BLOCK, size)
            if fp8:
                keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
            calls.append(partial(paged_attention, q, keys, values, table, starts, ends, **options))
        pairs = sum(
            min(n - c + i + 1, window) if window else n - c + i + 1 for c, n in sequences for i in range(c)
        )  # fmt: skip
        moved, operations = size_kv + 2 * ITEM * q.numel(), 4.0 * pairs * heads * size
        return Case("paged_attention", f"{model.name} {label}", calls, moved, operations)


def _copy_and_filter(
    logits: torch.Tensor, work: torch.Tensor, settings: tuple[torch.Tensor, ...] | None,
    then: Callable[[], object] | None = None,
) -> object:  # fmt: skip
    work.copy_(logits)
    if settings is not None:
        top_k_top_p_min_p(work, *settings)
    return then() if then is not None else work
