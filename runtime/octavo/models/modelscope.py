"""Models of ModelScope, over its plain HTTP interface. Called by `sources.resolve` when the environment asks for it.

The files gather in a hidden folder of Octavo's cache, where an interrupted download goes on later, and the folder gets
its name once it is complete.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from typing import Any

from octavo.errors import DownloadError, ModelNotFoundError
from octavo.models.cache import RECORD, cache_dir, publish
from octavo.models.download import (
    Meter,
    Remote,
    check_space,
    download,
    get_json,
    offline_by_choice,
    offline_error,
    reachable,
)
from octavo.models.hub import choose_files, split_id
from octavo.models.sources import ModelFiles, Request, files_at

_SHA256 = re.compile(r"[0-9a-f]{64}")


def wanted() -> bool:
    """Whether OCTAVO_USE_MODELSCOPE (or vLLM's VLLM_USE_MODELSCOPE) is true."""
    return any(os.environ.get(f"{name}_USE_MODELSCOPE", "").lower() in ("true", "1") for name in ("OCTAVO", "VLLM"))


class ModelScopeSource:
    """A ModelScope id such as `Qwen/Qwen3-0.6B`; takes the place of the Hugging Face Hub while `wanted()`."""

    name = "modelscope"

    def can_handle(self, request: Request) -> bool:
        repo, _ = split_id(request.model)
        return wanted() and re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", repo) is not None and ".." not in repo

    def fetch(self, request: Request) -> ModelFiles:
        repo, gguf = split_id(request.model)
        revision = request.revision or "master"
        if not re.fullmatch(r"[\w][\w.-]*", revision):
            raise ModelNotFoundError(f"{revision!r} cannot be a revision")
        folder = f"{repo.replace('/', '--')}@{revision}" + (f"@{gguf.replace('/', '--')}" if gguf else "")
        if not request.need_weights:
            folder += "@tokenizer"
        final = cache_dir() / "modelscope" / folder
        whole = final.with_name(folder.removesuffix("@tokenizer"))
        for cached in (whole, final):
            if (cached / RECORD).is_file():
                return files_at(cached, request.model, self.name)
        if offline_by_choice():
            raise offline_error(request.model, "HF_HUB_OFFLINE is set, and it is not in the cache")
        if not reachable(_endpoint()):
            raise offline_error(request.model, f"{_endpoint()} cannot be reached")
        token = request.token or os.environ.get("MODELSCOPE_API_TOKEN")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        base = f"{_endpoint()}/api/v1/models/{repo}/repo"
        files = _list(f"{base}/files?Revision={revision}&Recursive=true", headers, repo)
        chosen = choose_files(list(files), gguf, request.need_weights, request.model, request.allow_pickle)
        total = sum(files[name].size or 0 for name in chosen)
        partial = final.with_name(f".partial-{folder}")
        check_space(partial, total - sum(p.stat().st_size for p in partial.rglob("*") if p.is_file()), request.model)
        meter = Meter(request.model, total or None, request.progress)
        import filelock

        partial.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(str(final.with_name(f".{folder}.lock"))):
            if not (final / RECORD).is_file():
                for name in chosen:
                    query = urllib.parse.urlencode({"Revision": revision, "FilePath": name})
                    known = files[name]
                    remote = Remote(f"{base}?{query}", known.size, known.sha256)
                    download(remote, partial / name, meter=meter, headers=headers)
                for lock in partial.rglob("*.lock"):
                    lock.unlink(missing_ok=True)
                publish(partial, final, name=request.model, source=self.name, revision=revision)
        return files_at(final, request.model, self.name)


def _list(url: str, headers: dict[str, str], repo: str) -> dict[str, Remote]:
    """The files of a repository: name -> size and hash (the address is filled in later)."""
    try:
        answer: Any = get_json(url, headers)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{_endpoint()} has no model {repo!r}, or not this revision of it") from error
    try:
        found = {}
        for entry in answer["Data"]["Files"]:
            if entry.get("Type") == "tree":
                continue
            name, size, digest = str(entry["Path"]), entry.get("Size"), str(entry.get("Sha256") or "")
            if name.startswith("/") or ".." in name.split("/"):
                raise ValueError(f"the unsafe name {name[:80]!r}")
            found[name] = Remote(
                "", size if isinstance(size, int) else None, digest if _SHA256.fullmatch(digest) else None
            )
        return found
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DownloadError(f"{_endpoint()} gave no sound list of files for {repo!r}: {error!r}") from error


def _endpoint() -> str:
    domain = os.environ.get("MODELSCOPE_DOMAIN", "modelscope.cn").rstrip("/")
    return domain if "://" in domain else f"https://{domain}"
