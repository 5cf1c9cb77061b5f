"""The strip under a conversation: what the last answer cost, and what the engine is doing, as HTML."""

from __future__ import annotations

from html import escape

import torch
from octavo.async_llm import AsyncLLM

from octavo_apps.answering import Moment

_UNKNOWN = "–"


def strip(moment: Moment | None, llm: AsyncLLM | None) -> str:
    """Five figures with their names; dashes before the first answer."""
    first = speed = cached = memory = batch = _UNKNOWN
    if moment is not None:
        metrics, stats = moment.metrics, moment.stats
        if metrics.first_token_time is not None:
            first = f"{metrics.first_token_time:.2f} s"
        if metrics.time_per_token:
            speed = f"{1 / metrics.time_per_token:.0f}"
        cached = f"{metrics.cached_tokens} of {metrics.prompt_tokens}"
        if stats is not None and llm is not None:
            used, kept, total = (
                blocks * block_bytes(llm) / 2**20
                for blocks in (stats.blocks_used, stats.blocks_cached, stats.blocks_total)
            )
            memory = f"{used:.1f} + {kept:.1f} of {total:.0f} MB"
            batch = str(moment.most_running)
    items = (
        ("First token", first, "Time from sending to the first token of the answer"),
        ("Tokens/s", speed, "Tokens per second after the first"),
        ("Cached prompt tokens", cached, "Prompt tokens whose keys and values were in the cache already"),
        ("KV memory", memory, "Held by requests that run now, plus kept for later ones, of the cache's size"),
        ("Shared the batch", batch, "The most requests that were seen to share the engine's steps with this answer"),
    )
    cells = "".join(
        f'<div title="{escape(why)}"><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>'
        for name, value, why in items
    )
    return f'<dl class="strip" aria-label="Figures of the last answer">{cells}</dl>'


def block_bytes(llm: AsyncLLM) -> int:
    """Bytes of one block of the KV cache: keys and values of all layers."""
    shape, limits = llm.engine.model_config, llm.engine.limits
    item: torch.dtype = getattr(torch, limits.kv_cache_dtype)
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * limits.block_size * item.itemsize
