"""What is already on this machine: Octavo's own cache and the Hugging Face cache. Called by the sources and the CLI.

Octavo's cache has one folder per model, `<source>/<name>/`, with the model's files and an `octavo.json` that says what
it is. A folder appears there in one rename, complete; half a model is never seen.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import ModelNotFoundError

RECORD = "octavo.json"


@dataclass(frozen=True)
class CachedModel:
    """One model on disk. `size_bytes` is what `remove` would free; `path` is its folder."""

    name: str
    source: str
    path: Path
    size_bytes: int
    revision: str | None = None


def cache_dir() -> Path:
    """Octavo's cache: `$OCTAVO_CACHE`, else `$XDG_CACHE_HOME/octavo`, else `~/.cache/octavo`. It may not exist yet."""
    chosen = os.environ.get("OCTAVO_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return _user_cache() / "octavo"


def hf_cache_dir() -> Path:
    """The Hugging Face cache, by huggingface_hub's own variables, read anew at each call."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    home = os.environ.get("HF_HOME")
    return (Path(home).expanduser() if home else _user_cache() / "huggingface") / "hub"


def _user_cache() -> Path:
    chosen = os.environ.get("XDG_CACHE_HOME")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache"


def publish(prepared: Path, final: Path, *, name: str, source: str, revision: str | None) -> Path:
    """Move the complete folder `prepared` to `final` in one step, with its record. Both lie in the cache.

    If another process was faster, its folder stays and `prepared` is deleted.
    """
    record = {"name": name, "source": source, "revision": revision}
    (prepared / RECORD).write_text(json.dumps(record), encoding="utf-8")
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(prepared, final)
    except OSError:
        if not (final / RECORD).is_file():
            raise
        shutil.rmtree(prepared, ignore_errors=True)
    return final


def list_cached() -> list[CachedModel]:
    """The models in Octavo's cache and in the Hugging Face cache, by name."""
    return sorted([*_own(), *_hugging_face()], key=lambda model: (model.name.lower(), model.source))


def remove(name: str) -> int:
    """Delete every cached copy of `name` and return the bytes freed. Raises `ModelNotFoundError` when there is none."""
    freed = 0
    found = [model for model in list_cached() if model.name == name]
    if not found:
        raise ModelNotFoundError(f"no model named {name!r} is in the cache; list_cached() names those that are")
    for model in found:
        if model.source == "huggingface":
            freed += _remove_hugging_face(name)
            continue
        # renamed first: a process that looks now sees no model rather than half of one
        doomed = model.path.with_name(f".removed-{uuid.uuid4().hex[:8]}")
        os.replace(model.path, doomed)
        shutil.rmtree(doomed)
        freed += model.size_bytes
    return freed


def _own() -> list[CachedModel]:
    found = []
    for path in cache_dir().glob(f"*/*/{RECORD}"):
        if path.parent.name.startswith("."):
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            name, source, revision = str(record["name"]), str(record["source"]), record.get("revision")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # someone else's file, or one being removed
        size = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
        found.append(CachedModel(name, source, path.parent, size, revision))
    return found


def _hugging_face() -> list[CachedModel]:
    if not hf_cache_dir().is_dir():
        return []
    from huggingface_hub import scan_cache_dir

    found = []
    for repo in scan_cache_dir(hf_cache_dir()).repos:
        if repo.repo_type == "model":
            main = next((revision for revision in repo.revisions if "main" in revision.refs), None)
            revision = main or next(iter(repo.revisions), None)
            commit = revision.commit_hash if revision else None
            found.append(CachedModel(repo.repo_id, "huggingface", Path(repo.repo_path), repo.size_on_disk, commit))
    return found


def _remove_hugging_face(name: str) -> int:
    from huggingface_hub import scan_cache_dir

    info = scan_cache_dir(hf_cache_dir())
    repos = [repo for repo in info.repos if repo.repo_type == "model" and repo.repo_id == name]
    strategy = info.delete_revisions(*(revision.commit_hash for repo in repos for revision in repo.revisions))
    strategy.execute()
    return int(strategy.expected_freed_size)
