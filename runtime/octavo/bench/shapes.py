"""A model folder of a configuration alone, for random weights: speed does not depend on their values, nor on words."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def with_tokenizer(shape: Path) -> Iterator[Path]:
    """`shape` itself where it has a tokenizer; else a copy of its `config.json` beside a tokenizer of one word, kept
    until the engine is ready."""
    if not (shape / "config.json").is_file() or (shape / "tokenizer.json").is_file():
        yield shape
        return
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(shape / "config.json", folder)
        Tokenizer(WordLevel({"?": 0}, unk_token="?")).save(f"{folder}/tokenizer.json")
        yield Path(folder)
