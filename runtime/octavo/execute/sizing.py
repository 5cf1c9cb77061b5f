"""What an engine takes of the memory of its device, and how many blocks are left for its KV cache. Called by `build`.

On the CPU pages are taken when they are first touched, so an estimate before the weights are loaded is enough. On a GPU
everything is taken when it is made and nothing can be lent, so there the cache is sized twice: before the weights are
loaded, to refuse at once what cannot fit, and after that from what the card then has free. What steps will take besides
is an upper bound computed from sizes: to measure it would take a run of the largest step, whose kernels are compiled
later, all side by side. `tests/runtime/test_gpu_memory.py` holds the bound against what a GPU gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from octavo_kernels import tiles

from octavo.attention.cpu import KV_PAD
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.execute.graphs import sharing_sizes_up_to, sizes_up_to, token_sizes_up_to
from octavo.execute.runner import PROMPT_LOGPROB_TILE
from octavo.host import free_memory
from octavo.models.seq2seq_config import DecoderConfig

TOKENS_PER_SEQUENCE = 1024
"""The default KV cache holds so many tokens for each of `max_num_seqs` sequences."""
CONTEXT = 2**30
"""Of what is in use on a card outside of torch's allocator, at most so much is taken for this process's own context;
the rest is other processes'."""
LIBRARIES = 640 * 2**20
"""For the code of kernels and libraries, which is loaded when first used, and the workspaces of cuBLAS."""
GRAPH_LAYER = 64 * 2**10
"""For one layer of a recorded step, in the driver."""
PAGE = 2 * 2**20
"""Large allocations are rounded up to this by torch."""
LOGIT = 40
"""Bytes a logit while tokens are chosen, at most: with penalties there are the logits, those reported, those worked on
and two counts, and six more inside one expression, each float32; and masks."""
REPORTED_LOGIT = 30
"""The same for the logits of a prompt whose log-probabilities were asked for: two of float32, and a sort."""
HISTORY = 24
"""Bytes a token of history under penalties."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the memory of an engine on a GPU depends on."""

    model: DecoderConfig
    itemsize: int
    """Bytes of an activation."""
    block_size: int
    block_bytes: int
    """A block of the cache, all layers."""
    max_num_seqs: int
    max_num_batched_tokens: int
    max_len: int
    """The most that `max_model_len` can become."""
    deterministic: bool = False

    def activations(self, tokens: int) -> int:
        """Of a forward pass, at most. All that a layer makes is counted as if it lived at the same time."""
        model = self.model
        queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        numbers = 6 * model.hidden_size + 4 * queries + 4 * keys + 3 * model.intermediate_size
        smallest, most = tiles.FEW_SPLIT, tiles.MAX_SPLITS
        if self.deterministic:
            smallest, most = tiles.MIN_SPLIT, tiles.MAX_INVARIANT_SPLITS
        splits = min(most, -(-self.max_len // smallest))
        partial_sums = self.max_num_seqs * model.num_heads * splits * (model.head_dim + 2) * 4
        return tokens * (numbers * self.itemsize + 16 * model.num_heads + 64) + partial_sums

    def sampling(self) -> int:
        """Of choosing tokens by all ways that a request can ask for."""
        chosen = self.max_num_seqs * (self.model.vocab_size * (self.itemsize + LOGIT) + self.max_len * HISTORY)
        reported = PROMPT_LOGPROB_TILE * self.model.vocab_size * (self.itemsize + REPORTED_LOGIT)
        return max(chosen, reported)

    def rows(self) -> int:
        """Of what lives as long as the engine: device rows and the states of the step that ran last."""
        blocks = -(-(self.max_len + KV_PAD) // self.block_size)
        states = self.max_num_batched_tokens * (self.model.hidden_size * self.itemsize + 3 * 8)
        return self.max_num_seqs * 4 * (self.max_len + 1 + blocks) + states

    def recorded(self) -> int:
        """Of recorded steps: their memory, which all share, and the driver's."""
        longest = self.max_num_batched_tokens
        logits = self.max_num_seqs * self.model.vocab_size * self.itemsize
        graphs = 2 * len(sizes_up_to(self.max_num_seqs)) + len(sharing_sizes_up_to(self.max_num_seqs))
        graphs += 2 * len(token_sizes_up_to(longest)) + longest // 256
        return max(self.activations(longest), logits) + graphs * self.model.num_layers * GRAPH_LAYER

    def step(self) -> int:
        """All that is neither weights nor cache."""
        eager = max(self.activations(self.max_num_batched_tokens), self.sampling())
        # the tensors of the cache are rounded up, each
        return self.rows() + self.recorded() + eager + LIBRARIES + 2 * self.model.num_layers * PAGE

    def cache(self, tokens: int) -> int:
        """A KV cache for so many tokens. One block more is kept as padding."""
        return (-(-tokens // self.block_size) + 1) * self.block_bytes


@dataclass(frozen=True, slots=True)
class Card:
    """Bytes of a GPU."""

    free: int
    total: int
    context: int
    """In use by this process outside of torch's allocator."""

    @classmethod
    def of(cls, device: torch.device) -> Card:
        """What torch's allocator keeps for later is given back first: so it counts as free, but not what it cannot give
        back, such as the memory of another engine's graphs."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return cls(free, total, min(total - free - torch.cuda.memory_reserved(device), CONTEXT))


def blocks_on_gpu(config: EngineConfig, sizes: Sizes, card: Card, weights: int, *, loaded: bool) -> int:
    """Blocks of the cache beside `weights` bytes of weights, which are on the card already or are still to come: then
    everything stays within what is free and within the share that the engine may have. Raises `ConfigError`."""
    free = card.free + (weights if loaded else 0)
    share = config.gpu_memory_utilization
    limit = free if share is None else min(free, int(card.total * share) - card.context)
    room = limit - weights - sizes.step()
    asked = None
    if config.num_blocks is not None:
        asked = config.num_blocks
    elif config.kv_cache_memory is not None:
        asked = config.kv_cache_memory // sizes.block_bytes
        if asked < 2:
            raise ConfigError(
                f"kv_cache_memory={config.kv_cache_memory} holds no KV cache: two blocks take "
                f"{2 * sizes.block_bytes} bytes, one of them padding", "kv_cache_memory",
            )  # fmt: skip
    least = sizes.cache(config.max_model_len or 1)
    needed = least if asked is None else asked * sizes.block_bytes
    if needed > room:
        raise _does_not_fit(config, sizes, card, weights, needed=needed, free=free, limit=limit)
    if asked is not None:
        return asked
    blocks = room // sizes.block_bytes
    if share is None:
        wanted = max(sizes.max_num_seqs * TOKENS_PER_SEQUENCE, min(sizes.max_len, 32768))
        blocks = min(wanted // sizes.block_size + 2, max(blocks // 2, needed // sizes.block_bytes))
    return blocks


def _does_not_fit(
    config: EngineConfig, sizes: Sizes, card: Card, weights: int, *, needed: int, free: int, limit: int
) -> ConfigError:
    step = sizes.step()
    what = (
        f"the model does not fit on the GPU: weights take {_gib(weights)}, steps of up to "
        f"{sizes.max_num_batched_tokens} tokens and {sizes.max_num_seqs} sequences {_gib(step)}, the KV cache "
        f"{_gib(needed)}; {_gib(free)} of {_gib(card.total)} can be had"
    )
    if limit < free:
        what += f", of which gpu_memory_utilization={config.gpu_memory_utilization} allows {_gib(max(limit, 0))}"
    ways = list(_ways_out(config, sizes, card, weights, needed=needed, free=free, limit=limit))
    field = "model"
    if weights + step + 2 * sizes.block_bytes <= limit:
        given = ("num_blocks", "kv_cache_memory", "max_model_len")  # but for this one it would
        field = next((name for name in given if getattr(config, name) is not None), field)
    elif limit < free:
        field = "gpu_memory_utilization"
    return ConfigError(f"{what}. It would fit with {'; or with '.join(ways)}", field)


def _ways_out(
    config: EngineConfig, sizes: Sizes, card: Card, weights: int, *, needed: int, free: int, limit: int
) -> Iterator[str]:
    """Changes of one or two settings under which everything fits, each as an argument with its value."""
    room = limit - weights

    def fits(other: Sizes, cache: int = needed) -> bool:
        return other.step() + cache <= room

    if limit < free and weights + sizes.step() + needed <= free:
        share = -(-100 * (weights + sizes.step() + needed + card.context) // card.total) / 100
        if share <= 1:
            yield f"gpu_memory_utilization={share:.2f}"
    blocks = (room - sizes.step()) // sizes.block_bytes
    if blocks >= 2 and config.num_blocks is not None:
        yield f"num_blocks={blocks}"
    elif blocks >= 2 and config.kv_cache_memory is not None:
        yield f"kv_cache_memory={blocks * sizes.block_bytes}"
    elif blocks >= 2:
        yield f"max_model_len={(blocks - 1) * sizes.block_size}"
    per_number = 2 * sizes.model.num_layers * sizes.model.num_kv_heads * sizes.block_size * sizes.model.head_dim
    if sizes.block_bytes >= 2 * per_number and config.kv_cache_memory is None and fits(sizes, needed // 2):
        yield 'kv_cache_dtype="fp8"'
    tokens = _largest(sizes.max_num_batched_tokens, sizes.max_num_seqs, lambda n: fits(_with(sizes, tokens=n)))
    if tokens:
        yield f"max_num_batched_tokens={tokens}"
    rows = _largest(sizes.max_num_seqs, 1, lambda n: fits(_with(sizes, rows=n)))
    if rows:
        yield f"max_num_seqs={rows}"
    if not tokens and not rows:
        both = _largest(sizes.max_num_seqs, 1, lambda n: fits(_with(sizes, rows=n, tokens=max(n, 512))))
        if both:
            yield f"max_num_seqs={both} and max_num_batched_tokens={max(both, 512)}"
    left = room + weights - sizes.step() - needed
    if left > 0:
        yield f"a smaller model, or one quantised, whose weights take at most {_gib(left)}"
    else:
        yield "a larger GPU" if limit == free else "a larger share of the GPU"


def _with(sizes: Sizes, *, rows: int | None = None, tokens: int | None = None) -> Sizes:
    return replace(
        sizes, max_num_seqs=rows or sizes.max_num_seqs, max_num_batched_tokens=tokens or sizes.max_num_batched_tokens
    )


def _largest(above: int, least: int, fits: Callable[[int], bool]) -> int:
    """The largest power of two below `above` and not below `least` that fits; 0 if there is none."""
    size = 1 << (above - 1).bit_length() - 1 if above > 1 else 0
    while size >= least and size > 0:
        if fits(size):
            return size
        size //= 2
    return 0


def blocks_in_ram(config: EngineConfig, model: DecoderConfig, weights: int, sizes: Sizes) -> int:
    """Blocks of a cache on the CPU. Raises `ConfigError`."""
    if config.num_blocks is not None:
        return config.num_blocks
    block_bytes, block_size = sizes.block_bytes, sizes.block_size
    free, total = free_memory()
    if config.kv_cache_memory is not None:
        room, field = config.kv_cache_memory, "kv_cache_memory"
    elif config.gpu_memory_utilization is not None:
        room, field = int(total * config.gpu_memory_utilization) - weights - (total - free), "gpu_memory_utilization"
    else:
        wanted = max(
            sizes.max_num_seqs * TOKENS_PER_SEQUENCE, min(config.max_model_len or model.max_position, 32768)
        ) + 2 * block_size
        room, field = min(wanted // block_size * block_bytes, (free - weights) // 2), "model"
    blocks = room // block_bytes
    if blocks < 2:
        raise ConfigError(
            f"no room for a KV cache: a block takes {block_bytes / 2**20:.1f} MiB, the weights {_gib(weights)}, and "
            f"{_gib(free)} of {_gib(total)} are free", field,
        )  # fmt: skip
    return int(blocks)


def usable_length(config: EngineConfig, longest: int, num_blocks: int, block_size: int) -> int:
    """`max_model_len` with a cache of so many blocks, at most `longest`. Raises `ConfigError`."""
    capacity = (num_blocks - 1) * block_size
    length = config.max_model_len or min(longest, capacity)
    if length > capacity:
        raise ConfigError(
            f"max_model_len={length} does not fit into a KV cache of {capacity} tokens: lower it, or raise "
            "num_blocks, kv_cache_memory or gpu_memory_utilization", "max_model_len",
        )  # fmt: skip
    return length


def ran_out(error: BaseException | None) -> bool:
    """Memory of a GPU was asked for that is not there: said by torch, or by a library in its own words."""
    while error is not None:
        words = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in words or "alloc_failed" in words:
            return True
        error = error.__cause__ or error.__context__
    return False


def ran_out_while_starting(
    config: EngineConfig, sizes: Sizes, weights: int, num_blocks: int, card: Card
) -> ConfigError:
    """`card`: after everything was given back."""
    needed = num_blocks * sizes.block_bytes
    if weights + sizes.step() + needed > card.free:
        error = _does_not_fit(config, sizes, card, weights, needed=needed, free=card.free, limit=card.free)
        return ConfigError(f"the GPU ran out of memory while the model was made ready: {error}", error.field)
    field = "num_blocks" if config.num_blocks is not None else "kv_cache_memory"
    less = num_blocks // 2 if field == "num_blocks" else needed // 2
    return ConfigError(
        f"the GPU ran out of memory while the model was made ready, although {_gib(card.free)} of {_gib(card.total)} "
        f"are free now, and weights take {_gib(weights)}, steps {_gib(sizes.step())}, the KV cache {_gib(needed)}: "
        f"something else took it for a while. Try again, or leave more room with {field}={less}", field,
    )  # fmt: skip


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
