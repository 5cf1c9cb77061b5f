"""Pickled weights (`pytorch_model.bin`), for models that were published in no other form and only where the user
allowed it by `allow_pickle`. The one place where anything is unpickled: by torch's reader that makes tensors and plain
containers and refuses all else, so that nothing in a file can run. Called by `weights.py`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from octavo.errors import ModelFileError
from octavo.models.config import read_json
from octavo.models.weights import TensorReader


class PickledWeights(TensorReader):
    """A folder with `pytorch_model.bin`, or with `pytorch_model.bin.index.json` and its shards."""

    def __init__(self, folder: Path) -> None:
        self.place = str(folder)
        index = folder / "pytorch_model.bin.index.json"
        names = _shards(index) if index.is_file() else ["pytorch_model.bin"]
        self._tensors: dict[str, torch.Tensor] = {}
        for name in names:
            self._tensors |= _load(folder / name)

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._tensors:
            raise self._missing(name)
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def close(self) -> None:
        self._tensors = {}


def _load(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ModelFileError("is missing", str(path))
    found: Any
    try:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of torch before 1.6 cannot be mapped
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many classes, and whatever a broken file makes of them
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        message = f"holds more than tensors, or is broken, and was not read: {reason}"
        raise ModelFileError(message, str(path)) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and type(value) is torch.Tensor for name, value in found.items()
    ):
        raise ModelFileError("holds something else than an object from names to tensors", str(path))
    return found


def _shards(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    # plain names beside the index: anything else would let a model read files elsewhere
    if not names or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.bin", name) for name in names):
        raise ModelFileError("must name .bin files in this folder", str(index), "weight_map")
    return names
