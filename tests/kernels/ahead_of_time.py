"""Compiles the kernels for a GPU which is not there; started by `test_ahead_of_time.py` in a process of its own.

The launchers run as they would on that GPU, on CPU tensors, but what they launch is recorded instead of run. So what is
compiled are the tiles, the constants and the divisibility of arguments which are really used, not a copy of them.

    python ahead_of_time.py 90 attention        prints a JSON list of {name, constants, shared, warps, cubin, fp8}
"""

import json
import re
import sys
from typing import Any

import torch
import triton
from octavo_kernels import tiles
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

DTYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
RECORDED: list[tuple[JITFunction, dict[str, Any], dict[str, Any]]] = []


def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    names = [parameter.name for parameter in self.params]
    values = dict(zip(names, args, strict=False))
    options = {name: value for name, value in kwargs.items() if name not in names}
    values.update({name: value for name, value in kwargs.items() if name in names})
    assert set(values) == set(names), f"{self.__name__}: {set(names) ^ set(values)}"
    RECORDED.append((self, values, options))


def source(kernel: JITFunction, values: dict[str, Any]) -> ASTSource:
    """The specialisation Triton would choose: ones and None are constants, multiples of 16 are known to be such."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, values[parameter.name]
        aligned = False
        fixed = value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize)
        if parameter.is_constexpr or fixed:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, int) and parameter.do_not_specialize:
            signature[name] = "i32"
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + DTYPES[value.dtype]
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def attention_calls(fp8: bool) -> None:
    from octavo_kernels.attention_triton import paged_attention_triton

    def call(size: int, dtype: torch.dtype, heads: int = 8, cached: torch.dtype | None = None, **options: Any) -> None:
        cache = torch.zeros(4, 2, 16, size, dtype=cached or dtype)
        options["kv_scales"] = torch.ones(2, 2) if cached else None
        ints = torch.zeros(5, dtype=torch.int32)
        # sequences of both kinds and long enough for splits: the short kernel, the join and the long kernel
        paged_attention_triton(
            torch.zeros(64, heads, size, dtype=dtype), cache, cache, torch.zeros(4, 32, dtype=torch.int32),
            ints, ints[:4], max_query_len=32, max_seq_len=32768, scale=0.1, **options,
        )  # fmt: skip
        if options.get("invariant"):
            return
        paged_attention_triton(
            torch.zeros(4, heads, size, dtype=dtype), cache, cache, torch.zeros(4, 32, dtype=torch.int32),
            ints, ints[:4], max_query_len=1, max_seq_len=32768, scale=0.1, shared_splits=ints[:1],
            **{name: value for name, value in options.items() if name not in ("window", "alibi_slopes")},
        )  # fmt: skip

    for size in (64, 128, 256):
        call(size, torch.bfloat16)
        call(size, torch.float32)
    call(96, torch.float16, heads=6, window=100, soft_cap=50.0)
    call(128, torch.bfloat16, alibi_slopes=torch.zeros(8))
    for size in (64, 128, 256):
        call(size, torch.bfloat16, invariant=True, min_split=1024)
    if fp8:
        for size, dtype in ((128, torch.bfloat16), (256, torch.bfloat16), (64, torch.float32)):
            call(size, dtype, cached=torch.float8_e4m3fn)
        options = {"window": 100, "soft_cap": 50.0, "alibi_slopes": torch.zeros(6)}
        call(96, torch.float16, heads=6, cached=torch.float8_e4m3fn, **options)


def layer_calls(fp8: bool) -> None:
    from octavo_kernels.activation_triton import silu_and_mul_triton
    from octavo_kernels.norm_triton import fused_add_rms_norm_triton
    from octavo_kernels.rope_triton import rope_and_cache_triton
    from octavo_kernels.row_triton import row_linear_triton
    from octavo_kernels.steps_triton import enter_blocks_triton, find_broken_triton, step_inputs_triton

    for dtype in (torch.bfloat16, torch.float32):
        for columns in (576, 16384):
            x = torch.zeros(4, columns, dtype=dtype)
            fused_add_rms_norm_triton(x, None, x[0], 1e-6)
            fused_add_rms_norm_triton(x, x, x[0], 1e-6)
        silu_and_mul_triton(torch.zeros(4, 8192, dtype=dtype))
        for size, rotated in ((64, 64), (128, 32), (256, 256)):
            longs, norm = torch.zeros(4, dtype=torch.int64), torch.zeros(size, dtype=dtype)
            for cached, scales in ((dtype, None), (torch.float8_e4m3fn, torch.ones(2, 2)))[: 1 + fp8]:
                cache = torch.zeros(4, 2, 16, size, dtype=cached)
                rope_and_cache_triton(
                    torch.zeros(4, 12 * size, dtype=dtype), torch.zeros(64, rotated), longs, longs, cache, cache, 8, 2,
                    q_norm=norm, k_norm=norm, kv_scales=scales,
                )  # fmt: skip
        for outputs, inputs in ((2048, 1536), (4096, 14336)):
            x, weight = torch.zeros(1, inputs, dtype=dtype), torch.zeros(outputs, inputs, dtype=dtype)
            row_linear_triton(x, weight, norm=x[0], eps=1e-6, gated=True)
            row_linear_triton(x, weight, weight[:, 0].contiguous(), residual=weight[None, :, 0].contiguous())
    ints, table = torch.zeros(5, dtype=torch.int32), torch.zeros(8, 64, dtype=torch.int32)
    step_inputs_triton(ints[:4], ints[:4], ints, table, table, 16, total=16)
    enter_blocks_triton(table, ints, ints, ints)
    find_broken_triton(torch.zeros(8, 4096, dtype=torch.bfloat16), ints, ints[:4])


def product_calls(fp8: bool) -> None:
    from octavo_kernels.invariant_triton import invariant_linear_triton

    tiles.multiprocessors = lambda device: 132  # type: ignore[assignment]
    for outputs, inputs in ((1024, 3072), (6144, 1024), (49152, 576)):
        weight = torch.zeros(outputs, inputs, dtype=torch.bfloat16)
        for rows in (1, 64, 256, 2048):
            invariant_linear_triton(torch.zeros(rows, inputs, dtype=torch.bfloat16), weight, weight[:, 0].contiguous())
    invariant_linear_triton(torch.zeros(4, 100), torch.zeros(100, 100))


def sampling_calls(fp8: bool) -> None:
    from octavo_kernels.draw_triton import draw_tokens_triton
    from octavo_kernels.filter_triton import top_k_top_p_min_p_triton
    from octavo_kernels.forbid_triton import forbid_tokens_triton
    from octavo_kernels.gumbel_triton import gumbel_sample_triton

    floats, ints, longs = torch.zeros(4), torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    for vocab in (49152, 151936):
        for dtype in (torch.bfloat16, torch.float32):
            logits = torch.zeros(4, vocab, dtype=dtype)
            gumbel_sample_triton(logits, floats, longs, longs)
            draw_tokens_triton(logits, ints, ints, torch.zeros(4, 6)[:, 0], longs, ints[:, None].repeat(1, 64))
        top_k_top_p_min_p_triton(torch.zeros(4, vocab), floats, ints, floats, floats)
        forbid_tokens_triton(torch.zeros(4, vocab), longs, torch.zeros(4, -(-vocab // 32), dtype=torch.int32))


CALLS = {"attention": attention_calls, "layers": layer_calls, "products": product_calls, "sampling": sampling_calls}


def main(arch: int, group: str) -> None:
    tiles.architecture = lambda device: arch  # type: ignore[assignment]
    JITFunction.run = record  # type: ignore[method-assign]
    CALLS[group](fp8=arch >= 89)
    results, seen = [], set()
    for kernel, values, options in RECORDED:
        one = source(kernel, values)
        key = (kernel.__name__, str(one.signature), str(one.constants), str(one.attrs), str(options))
        if key in seen:
            continue
        seen.add(key)
        compiled = triton.compile(one, target=GPUTarget("cuda", arch, 32), options=options)
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        results.append({
            "name": kernel.__name__, "constants": constants, "shared": compiled.metadata.shared,
            "warps": options.get("num_warps"), "cubin": len(compiled.asm["cubin"]),
            "fp8": sorted(set(re.findall(r"[\w.]*e4m3[\w.]*", compiled.asm["ptx"]))),
        })  # fmt: skip
    print(json.dumps(results, default=str))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
