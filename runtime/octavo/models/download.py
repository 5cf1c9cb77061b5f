"""Fetching one file over HTTP so that nothing is lost and nothing half done is left. Called by hub, modelscope, pypi.

A download goes to `<file>.part`, goes on from there after an interruption (also in another process), is compared with
the size and the hash that the source states, and only then gets its name. A lock file keeps two processes from writing
one part. Plain `urllib`: no dependency, proxies and certificates from the environment.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import shutil
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import DownloadError, ModelNotFoundError

if TYPE_CHECKING:
    from octavo.models.sources import Progress

REACH_SECONDS = 2.0
"""How long to wait for a connection before calling the machine offline."""
_STALL_SECONDS = 30.0
_CHUNK = 1 << 20
_RETRIES = 5


@dataclass
class Meter:
    """Adds up the bytes of all files of one model, from several threads, and reports to the user's `Progress`."""

    label: str
    total: int | None
    progress: Progress | None
    done: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int) -> None:
        """Count `count` more bytes; negative when a part had to be thrown away."""
        with self._lock:
            self.done += count
            if self.progress is not None:
                self.progress(self.label, self.done, self.total)


def offline_by_choice() -> bool:
    """Whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids the network."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def offline_error(model: str, reason: str) -> DownloadError:
    """The error for a model that cannot be fetched from here, saying what to do instead."""
    return DownloadError(
        f"cannot fetch {model!r}: {reason}. What you can do: connect to the network (behind a proxy set HTTPS_PROXY; "
        "with a mirror of the Hub set HF_ENDPOINT); pass the path of a model folder or of a .gguf file; or use a model "
        "that is cached already (`octavo models` lists them), or the default model, which comes from the package "
        "index. Models fetched once load without a network; HF_HUB_OFFLINE=1 makes sure that none is used."
    )


def reachable(url: str, seconds: float = REACH_SECONDS) -> bool:
    """Whether a connection to the host of `url` (or to the proxy for it) opens within `seconds`."""
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        through = urllib.parse.urlsplit(proxy if "//" in proxy else f"http://{proxy}")
        host, port = through.hostname or "", through.port or 3128
    opened = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            opened.set()
        except OSError:
            return
        finally:
            finished.set()

    # in a thread of its own, because looking up a name takes no timeout
    finished = threading.Event()
    threading.Thread(target=connect, daemon=True, name="octavo-reachable").start()
    finished.wait(seconds)
    return opened.is_set()


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise `DownloadError` when the disk of `folder` has less than `needed` bytes free."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise no_space(folder, needed, what, free)


def no_space(folder: Path, needed: int | None, what: str, free: int | None = None) -> DownloadError:
    amount = "more bytes than are free" if needed is None else f"{needed} bytes"
    have = "" if free is None else f", and only {free} are free"
    return DownloadError(
        f"the disk is full: {what} needs {amount} in {folder}{have}. Free some space, or set OCTAVO_CACHE (for models "
        "of the Hugging Face Hub: HF_HOME) to a folder on another disk."
    )


@contextmanager
def disk_errors(folder: Path, needed: int | None, what: str) -> Iterator[None]:
    """Turn "no space left" and "not permitted" into a `DownloadError` that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(folder, needed, what) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            message = (
                f"cannot write to {folder} ({error.strerror}): set OCTAVO_CACHE or HF_HOME to a folder you may write to"
            )
            raise DownloadError(message) from error
        raise


@dataclass(frozen=True)
class Remote:
    """One file to fetch. `sha256` and `git_sha1` (the hash of a git blob) are compared when given."""

    url: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None


def download(remote: Remote, dest: Path, *, meter: Meter, headers: Mapping[str, str] | None = None) -> Path:
    """Fetch `remote` to `dest`, unless it is there. Returns `dest`.

    Raises:
        DownloadError: interrupted for good (the part stays, to go on from), corrupt, refused, or the disk is full.
        ModelNotFoundError: the server says there is no such file.
    """
    import filelock

    part = dest.with_name(dest.name + ".part")
    with disk_errors(dest.parent, remote.size, dest.name):
        dest.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(str(dest.with_name(dest.name + ".lock"))):
            if not dest.exists():
                _fill(remote, part, meter, dict(headers or {}))
                os.replace(part, dest)
            else:
                meter.add(dest.stat().st_size)
    return dest


def _fill(remote: Remote, part: Path, meter: Meter, headers: dict[str, str]) -> None:
    """Bring `part` to the whole, checked content of `remote`."""
    have = part.stat().st_size if part.exists() else 0
    resumed = have > 0
    check_space(part.parent, max((remote.size or 0) - have, 0), part.stem)
    meter.add(have)
    for fresh in (False, True):
        if fresh:  # a resumed part that does not match may have been of another version: once more from the start
            meter.add(-part.stat().st_size)
            part.unlink()
        _fetch(remote, part, meter, headers)
        wrong = _mismatch(remote, part)
        if wrong is None:
            return
        if fresh or not resumed:
            meter.add(-part.stat().st_size)
            part.unlink()
            raise DownloadError(f"{remote.url} arrived corrupt ({wrong}); nothing was kept, try again")


def _fetch(remote: Remote, part: Path, meter: Meter, headers: dict[str, str]) -> None:
    failures = 0
    while True:
        have = part.stat().st_size if part.exists() else 0
        if remote.size is not None and have >= remote.size:
            return
        try:
            if _request(remote, part, have, meter, headers):
                return
            reason: object = "the connection closed early"
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # beyond the end: the comparison that follows decides
                return
            if error.code not in (408, 429, 500, 502, 503, 504):
                raise _refused(error, remote.url) from error
            reason = error
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            reason = error
        now = part.stat().st_size if part.exists() else 0
        failures = 1 if now > have else failures + 1
        if failures > _RETRIES:
            size = "?" if remote.size is None else remote.size
            message = (
                f"{remote.url} was interrupted after {now} of {size} bytes ({reason}); the next try goes on from there"
            )
            raise DownloadError(message)
        time.sleep(min(0.2 * 2 ** (failures - 1), 5.0))


def _request(remote: Remote, part: Path, have: int, meter: Meter, headers: dict[str, str]) -> bool:
    """Append the rest of `remote` to `part`; False when the connection ended too soon."""
    if have:
        headers = {**headers, "Range": f"bytes={have}-"}
    request = urllib.request.Request(remote.url, headers={"User-Agent": "octavo", **headers})
    with _opener().open(request, timeout=_STALL_SECONDS) as response:
        if have and response.status != 206:  # the server does not know ranges: from the start
            meter.add(-have)
            part.unlink()
            have = 0
        announced = response.headers.get("Content-Length")
        received = 0
        with open(part, "ab") as out:
            while chunk := response.read(_CHUNK):
                out.write(chunk)
                received += len(chunk)
                meter.add(len(chunk))
        if remote.size is not None:
            return have + received >= remote.size
        return announced is None or received >= int(announced)


def get_json(url: str, headers: Mapping[str, str] | None = None, timeout: float = 10.0) -> Any:
    """The JSON at `url`. Raises `DownloadError`, or `ModelNotFoundError` for a 404."""
    import json

    request = urllib.request.Request(url, headers={"User-Agent": "octavo", **(headers or {})})
    try:
        with _opener().open(request, timeout=timeout) as response:
            return json.loads(response.read(64 << 20))
    except urllib.error.HTTPError as error:
        raise _refused(error, url) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DownloadError(f"{url} gave no usable answer: {error}") from error


def _refused(error: urllib.error.HTTPError, url: str) -> DownloadError | ModelNotFoundError:
    error.close()
    if error.code == 404:
        return ModelNotFoundError(f"{url} does not exist")
    if error.code in (401, 403):
        return DownloadError(
            f"{url} is not open to you ({error.code}): accept its licence on the site and pass a token"
        )
    return DownloadError(f"{url} was refused: {error.code} {error.reason}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, but take the token along only on the same host: storage hosts must not see it."""

    def redirect_request(self, req: urllib.request.Request, *args: Any) -> urllib.request.Request | None:
        new = super().redirect_request(req, *args)
        if new is not None and urllib.parse.urlsplit(new.full_url).netloc != urllib.parse.urlsplit(req.full_url).netloc:
            new.remove_header("Authorization")
        return new


def _opener() -> urllib.request.OpenerDirector:
    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"] and not os.path.isdir(ssl.get_default_verify_paths().capath or ""):
        import certifi  # some Python builds find no certificates of the system

        context = ssl.create_default_context(cafile=certifi.where())
    return urllib.request.build_opener(_Redirects, urllib.request.HTTPSHandler(context=context))


def _mismatch(remote: Remote, path: Path) -> str | None:
    """What is wrong with the content of `path`, or None."""
    size = path.stat().st_size
    if remote.size is not None and size != remote.size:
        return f"{size} bytes instead of {remote.size}"
    for expected, digest, prefix in (
        (remote.sha256, hashlib.sha256, b""),
        (remote.git_sha1, hashlib.sha1, b"blob %d\0" % size),
    ):
        if expected is None:
            continue
        state = digest(prefix)
        with open(path, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                state.update(chunk)
        if state.hexdigest() != expected.lower():
            return f"its hash is {state.hexdigest()}, not {expected}"
    return None
