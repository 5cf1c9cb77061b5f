"""Makes a model and fills it: every weight is copied once, from the mapped file straight into its place."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from octavo.errors import ModelFileError
from octavo.layers.linear import ProductMaker, product_with
from octavo.models.config import ModelConfig
from octavo.models.llama import LlamaFamily
from octavo.models.registry import build_model
from octavo.models.sources import ModelFiles
from octavo.models.weights import WeightReader, open_dummy, open_weights

Progress = Callable[[str, int, int | None], None]

LOAD_THREADS = 2
"""Copies and dequantisation leave the interpreter; more threads than this did not help on 2 cores."""


def load_model(
    files: ModelFiles, config: ModelConfig, *, load_format: str, max_len: int, dtype: torch.dtype, device: torch.device,
    progress: Progress | None = None, product: ProductMaker = product_with,
) -> LlamaFamily:  # fmt: skip
    """Raises `ModelFileError` naming file and tensor where the checkpoint and the config do not fit together."""
    model = build_model(config, max_len=max_len, dtype=dtype, device=device)
    targets = model.targets()
    opened = open_dummy() if load_format == "dummy" else open_weights(files, config)
    with opened as reader, torch.inference_mode():
        if load_format != "dummy":
            _check_names(files, set(reader.names()), set(targets))
        fill(reader, targets, progress)
        model.finish(product)
    return model


def fill(reader: WeightReader, targets: dict[str, torch.Tensor], progress: Progress | None = None) -> None:
    """Copy each tensor of `targets` to its place, and empty `targets`: or the unpacked weights would live as long as
    it."""
    # largest first, so that no thread is left alone with the embedding at the end
    order = sorted(targets.items(), key=lambda item: -item[1].numel())
    with ThreadPoolExecutor(LOAD_THREADS) as pool:
        for done, _ in enumerate(pool.map(lambda item: _copy(reader, *item), order), start=1):
            if progress is not None:
                progress("loading", done, len(order))
    targets.clear()


def _copy(reader: WeightReader, name: str, dest: torch.Tensor) -> None:
    reader.copy_into(name, dest)
    reader.forget(name)


def _check_names(files: ModelFiles, given: set[str], wanted: set[str]) -> None:
    missing = sorted(wanted - given)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ModelFileError(f"the weights lack this tensor{more}", str(files.path), missing[0])
