"""Models of the Hugging Face Hub. Called by `sources.resolve`.

Files live in the Hugging Face cache, in its documented layout (blobs, snapshots, refs), so that transformers and others
share them. `huggingface_hub` lists the repository and knows the user's token; the bytes come through `download`,
because the library forgets a partial file when its process ends.

A model that is complete in the cache is used without asking the network, so that starting takes no round trip and works
offline. A `revision` that is not a commit hash is looked up again; `cache.remove(name)` makes the next use fetch anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.parse
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.errors import DownloadError, ModelFileError, ModelNotFoundError, UnsupportedModelError
from octavo.models.cache import hf_cache_dir
from octavo.models.config import read_json
from octavo.models.download import (
    Meter,
    Remote,
    check_space,
    disk_errors,
    download,
    offline_by_choice,
    offline_error,
    reachable,
)
from octavo.models.encoder_config import ENCODERS, MODULE_FOLDER
from octavo.models.folder import check_folder
from octavo.models.sources import ModelFiles, Request

_ID = re.compile(r"[\w][\w.-]{0,95}(?:/[\w][\w.-]{0,95})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[\w][\w./-]{0,200}")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_PICKLES = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_SMALL = re.compile(
    r"[\w.-]+\.(json|jinja)|additional_chat_templates/[\w.-]+\.jinja|[\w.-]+\.(model|tiktoken|spm)|(vocab|merges)\.txt"
    rf"|{MODULE_FOLDER.pattern}/config\.json"
)
_THREADS = 4


class HubSource:
    """A Hugging Face id such as `Qwen/Qwen3-0.6B`, or `org/name/file.gguf` for one file of a repository."""

    name = "huggingface"

    def can_handle(self, request: Request) -> bool:
        repo, gguf = split_id(request.model)
        return bool(_ID.fullmatch(repo)) and ".." not in repo and (gguf is None or ".." not in gguf)

    def fetch(self, request: Request) -> ModelFiles:
        repo, gguf = split_id(request.model)
        revision = request.revision or "main"
        if not _REVISION.fullmatch(revision) or ".." in revision:
            raise ModelNotFoundError(f"{revision!r} cannot be a revision")
        cached = find_cached(request)
        if cached is not None and (request.revision is None or _COMMIT.fullmatch(revision) or offline_by_choice()):
            return cached
        if offline_by_choice():
            raise offline_error(request.model, "HF_HUB_OFFLINE is set, and it is not complete in the cache")
        if not reachable(_endpoint()):
            if cached is not None:
                return cached
            raise offline_error(request.model, f"{_endpoint()} cannot be reached")
        listing = _list(repo, revision, request.token)
        chosen = choose_files(list(listing.files), gguf, request.need_weights, request.model, request.allow_pickle)
        return _fetch_files(request, listing, chosen, revision)


def split_id(model: str) -> tuple[str, str | None]:
    """`org/name/some.gguf` -> (`org/name`, `some.gguf`); any other id has no file."""
    parts = model.split("/", 2)
    if len(parts) == 3 and parts[2].endswith(".gguf"):
        return "/".join(parts[:2]), parts[2]
    return model, None


def choose_files(
    names: list[str], gguf: str | None, need_weights: bool, model: str, allow_pickle: bool = False
) -> list[str]:
    """The files of a repository that Octavo reads: configuration, tokenizer, and safetensors or one GGUF.

    Code (.py) is never among them, and pickles only where they are allowed and there is nothing else. Raises when there
    is nothing to choose.
    """
    if gguf is not None:
        if gguf not in names:
            raise ModelNotFoundError(f"{model!r}: the repository has no file {gguf!r}")
        return [gguf]
    small = [name for name in names if _SMALL.fullmatch(name) and not name.endswith(".bin.index.json")]
    tensors = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    # some repositories hold the same weights twice, a second time under another name
    tensors = [name for name in tensors if _WEIGHTS.fullmatch(name)] or [
        name for name in tensors if not name.startswith("consolidated")
    ]
    if tensors:
        return small + (tensors if need_weights else [])
    ggufs = [name for name in names if name.endswith(".gguf") and "/" not in name]
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise ModelFileError(
            f"holds several GGUF files; name one, such as {model}/{ggufs[0]}: {', '.join(ggufs[:12])}", model
        )
    pickles = [name for name in names if _PICKLES.fullmatch(name)]
    if pickles and allow_pickle:
        return small + (pickles if need_weights else [])
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        message = "has only pickled weights, which can run code when read: see allow_pickle"
        raise UnsupportedModelError(message, file=model)
    if need_weights or not small:
        raise ModelFileError("has neither safetensors nor GGUF weights", file=model)
    return small


def find_cached(request: Request) -> ModelFiles | None:
    """The model in the Hugging Face cache, if all that `request` needs is there. Touches no network."""
    repo, gguf = split_id(request.model)
    root = _repo_root(repo)
    revision = request.revision or "main"
    commit = revision
    if not _COMMIT.fullmatch(revision):
        ref = root / "refs" / revision
        if not ref.is_file():
            return None
        commit = ref.read_text(encoding="utf-8").strip()
    snapshot = root / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    check_folder(snapshot)
    if gguf is not None:
        return (
            ModelFiles(request.model, snapshot / gguf, "gguf", "huggingface") if (snapshot / gguf).is_file() else None
        )
    if _complete(snapshot, request.need_weights, request.allow_pickle):
        return ModelFiles(request.model, snapshot, "safetensors", "huggingface")
    ggufs = list(snapshot.glob("*.gguf"))
    if len(ggufs) == 1 and ggufs[0].is_file() and not (snapshot / "config.json").exists():
        return ModelFiles(request.model, ggufs[0], "gguf", "huggingface")
    return None


def _complete(snapshot: Path, need_weights: bool, allow_pickle: bool) -> bool:
    """Whether a snapshot has all its parts: other programs fetch single files, and broken links count as missing."""
    if not (snapshot / "config.json").is_file() or not any((snapshot / name).is_file() for name in _TOKENIZER_FILES):
        return False
    if not _has_modules(snapshot):
        return False
    if not need_weights:
        return True
    kind = "safetensors"
    if allow_pickle and not any(snapshot.glob("*.safetensors")):
        kind = "bin"
    index = snapshot / f"{'pytorch_model' if kind == 'bin' else 'model'}.{kind}.index.json"
    if index.is_file():
        try:
            shards = set(read_json(index)["weight_map"].values())
        except (ModelFileError, KeyError, AttributeError, TypeError):
            return False
        return all(isinstance(shard, str) and (snapshot / shard).is_file() for shard in shards)
    return any(path.is_file() for path in snapshot.glob(f"*.{kind}"))


def _has_modules(snapshot: Path) -> bool:
    """Whether an encoder has what sentence-transformers keeps beside it: without that it would pool in another way, and
    programs that know nothing of it do not fetch it. A repository that has none is marked so, as huggingface_hub marks
    it."""
    try:
        if read_json(snapshot / "config.json").get("model_type") not in ENCODERS:
            return True
        if not (snapshot / "modules.json").is_file():
            return _marker(snapshot).is_file()
        modules = json.loads((snapshot / "modules.json").read_text(encoding="utf-8"))
        pooled = [module["path"] for module in modules if module["type"].endswith(".Pooling")]
        return all((snapshot / path / "config.json").is_file() for path in pooled if MODULE_FOLDER.fullmatch(path))
    except (ModelFileError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return True  # whoever reads it says what is wrong


def _marker(snapshot: Path) -> Path:
    return snapshot.parent.parent / ".no_exist" / snapshot.name / "modules.json"


@dataclass(frozen=True)
class _Listing:
    """What a repository holds at one commit."""

    repo: str
    commit: str
    files: dict[str, Any]  # name -> huggingface_hub's RepoSibling
    token: str | None


def _list(repo: str, revision: str, token: str | None) -> _Listing:
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    token = token or get_token()
    try:
        info = HfApi(endpoint=_endpoint(), token=token).model_info(
            repo, revision=revision, files_metadata=True, timeout=10.0
        )
    except GatedRepoError as error:
        message = f"{repo!r} is gated: accept its licence on {_endpoint()}/{repo}, then pass a token or set HF_TOKEN"
        raise DownloadError(message) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{repo!r} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        message = f"{_endpoint()} has no model {repo!r} (or it is private: pass a token or set HF_TOKEN)"
        raise ModelNotFoundError(message) from error
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) in (401, 403):
            message = f"{_endpoint()} does not let you see {repo!r}: the token is wrong or lacks the right to read it"
            raise DownloadError(message) from error
        raise DownloadError(f"{_endpoint()} refused to list {repo!r}: {error}") from error
    except Exception as error:  # whichever HTTP library huggingface_hub uses, its network errors end up here
        raise offline_error(repo, f"{_endpoint()} gave no answer ({type(error).__name__}: {error})") from error
    if not info.sha or not _COMMIT.fullmatch(info.sha):
        raise DownloadError(f"{_endpoint()} named no commit for {repo!r}")
    return _Listing(repo, info.sha, {sibling.rfilename: sibling for sibling in info.siblings or ()}, token)


def _fetch_files(request: Request, listing: _Listing, chosen: list[str], revision: str) -> ModelFiles:
    root = _repo_root(listing.repo)
    snapshot = root / "snapshots" / listing.commit
    remotes = {name: _remote(listing, name) for name in chosen}
    missing = [name for name in chosen if not (snapshot / name).is_file()]
    sizes = [remote.size for remote in remotes.values()]
    total = sum(size or 0 for size in sizes) if all(sizes) else None
    check_space(root, sum(remotes[name].size or 0 for name in missing), request.model)
    meter = Meter(request.model, total, request.progress)
    headers = {"Authorization": f"Bearer {listing.token}"} if listing.token else {}

    def fetch(name: str) -> None:
        remote, place = remotes[name], snapshot / name
        if place.is_file():
            meter.add(place.stat().st_size)
            return
        # etags name the blobs, as in huggingface_hub; without one, the file itself stands in the snapshot
        etag = remote.sha256 or remote.git_sha1
        if etag is None:
            download(remote, place, meter=meter, headers=headers)
            return
        blob = download(remote, root / "blobs" / etag, meter=meter, headers=headers)
        with disk_errors(root, None, request.model):
            _link(blob, place)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="octavo-download") as pool:
        for _ in pool.map(fetch, chosen):
            pass
    if "modules.json" not in listing.files and not _has_modules(snapshot):
        _marker(snapshot).parent.mkdir(parents=True, exist_ok=True)
        _marker(snapshot).touch()
    ref = root / "refs" / revision
    if not _COMMIT.fullmatch(revision):  # written last: it makes the snapshot the current one
        ref.parent.mkdir(parents=True, exist_ok=True)
        _write(ref, listing.commit)
    if len(chosen) == 1 and chosen[0].endswith(".gguf"):
        return ModelFiles(request.model, snapshot / chosen[0], "gguf", "huggingface")
    return ModelFiles(request.model, snapshot, "safetensors", "huggingface")


def _remote(listing: _Listing, name: str) -> Remote:
    sibling = listing.files[name]
    url = f"{_endpoint()}/{listing.repo}/resolve/{listing.commit}/{urllib.parse.quote(name)}"
    lfs = sibling.lfs
    sha256 = _hash(getattr(lfs, "sha256", None), 64)
    return Remote(url, sibling.size, sha256, None if sha256 else _hash(sibling.blob_id, 40))


def _hash(value: object, digits: int) -> str | None:
    """A hash names a file in the cache, so it must be one."""
    return value if isinstance(value, str) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", value) else None


def _link(blob: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.symlink_to(os.path.relpath(blob, place.parent))
    except OSError:  # no symbolic links here (Windows without the right)
        try:
            os.link(blob, temporary)
        except OSError:
            shutil.copyfile(blob, temporary)
    os.replace(temporary, place)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _repo_root(repo: str) -> Path:
    return hf_cache_dir() / f"models--{repo.replace('/', '--')}"


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
