"""What the tests of model files share: tiny real models, a real GGUF writer, real local HTTP servers, texts.

Import what you need by name; these are not in a conftest.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from octavo.errors import DownloadError
from octavo.models.sources import DEFAULT_MODEL, ModelFiles, resolve

SENTENCES = [
    "The capital of France is Paris.",
    "  two leading spaces, trailing ones  ",
    "def f(x):\n\tif x > 1_000:\n        return x ** 2  # comment\n\n\n1. item\n\n2.  item",
    "It's they'll WE'VE don’t I'd I'm you're",
    "naïve café e\u0301 n\u0303 ﬁ ①②③ ½ ٣٤٥ १२३",
    "Привет, мир! Γειά σου Κόσμε שלום עולם مرحبا بالعالم",
    "नमस्ते दुनिया สวัสดีชาวโลก 안녕하세요 こんにちは世界 你好，世界",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇫🇷 ☕️",
    "x  7   42\t3\n\n5 3.14159 1e-10 0xFF 2024-01-02",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "\x00\x07\x1b[0m\u200b\u200d\ufeff\u2028",
    "a" * 300,
    "",
    " ",
    "\n",
]


def many_texts(count: int, seed: int = 0) -> list[str]:
    """`count` different strings: real sentences, random text of many scripts, and mixtures."""
    rng = random.Random(seed)
    ranges = [
        (0x20, 0x7E), (0x20, 0x7E), (0x30, 0x39), (0x9, 0xD), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF),
        (0x400, 0x4FF), (0x590, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x206F),
        (0x2460, 0x24FF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (0x10000, 0x10FFF),
    ]  # fmt: skip
    words = " ".join(SENTENCES).split(" ")
    out = list(SENTENCES)
    while len(out) < count:
        parts = []
        for _ in range(rng.randint(1, 12)):
            kind = rng.random()
            if kind < 0.4:
                parts.append(rng.choice(words))
            elif kind < 0.6:
                parts.append(
                    rng.choice([" ", "  ", "   ", "\n", "\n\n", "\t", " \n ", "\r\n"]) + str(rng.randint(0, 99999))
                )
            else:
                low, high = rng.choice(ranges)
                parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8))))
        out.append(rng.choice(["", " ", " "]).join(parts))
    return out


@pytest.fixture(scope="session")
def default_model() -> ModelFiles:
    """The default model, from the cache or fetched as a user would get it."""
    try:
        return resolve(DEFAULT_MODEL)
    except DownloadError as error:
        pytest.skip(f"the default model is not at hand: {error}")


# -- tiny models ------------------------------------------------------------------------------------------------------

CORPUS = [*SENTENCES, *many_texts(400, seed=7)]


def byte_level_backend(vocab_size: int = 600) -> Any:
    """A byte-level BPE tokenizer, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece_tokens(size: int = 500) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a small sentencepiece-style vocabulary with byte fallback, trained on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    latin = [text for text in CORPUS if text.isascii()] + ["the capital of France is Paris hello world"] * 5
    backend.train_from_iterator(latin, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    learned = [token for token, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1])]
    learned = [token for token in learned if "\n" not in token and "\t" not in token and token.isprintable()]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    types = [2, 3, 3, *([6] * 256), *([1] * len(learned))]
    scores = [0.0] * 259 + [-float(index) for index in range(len(learned))]
    return tokens, scores, types


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, Any], arch: str = "llama") -> Path:
    """Write a GGUF with the `gguf` library's own writer. `tensors`: name -> array, or (array, type) to quantise."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            array, kind = value
            writer.add_tensor(name, gguf.quants.quantize(np.asarray(array), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_metadata(
    hidden: int = 32, heads: int = 4, kv_heads: int = 2, layers: int = 1, arch: str = "llama"
) -> dict[str, Any]:
    return {
        f"{arch}.embedding_length": hidden,
        f"{arch}.block_count": layers,
        f"{arch}.feed_forward_length": 2 * hidden,
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": kv_heads,
        f"{arch}.context_length": 128,
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
    }


GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_tensors(state: dict[str, Any], heads: int, kv_heads: int, permute: bool) -> dict[str, Any]:
    """A Hugging Face state as llama.cpp's converter writes it: its names, and q and k rows interleaved for "llama"."""
    out = {}
    for name, tensor in state.items():
        stem, kind = name.rsplit(".", 1)
        layer = ""
        if stem.startswith("model.layers."):
            _, _, index, stem = stem.split(".", 3)
            layer = f"blk.{index}."
        array = tensor.float().numpy()
        if permute and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            count = heads if stem.endswith("q_proj") else kv_heads
            # convert_hf_to_gguf.py: LlamaModel.permute
            shape = array.shape
            array = array.reshape(count, 2, shape[0] // count // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        out[f"{layer}{GGUF_NAMES[stem]}.{kind}"] = array
    return out


# -- servers ----------------------------------------------------------------------------------------------------------


@dataclass
class FileServer:
    """A local HTTP server that imitates the endpoints of the Hugging Face Hub and of ModelScope, ranges included.

    Faults: `cut` closes the connection after that many bytes of a body, once for each; `corrupt` flips a byte.
    """

    files: dict[str, bytes]
    repo: str = "acme/tiny"
    commit: str = "0123456789abcdef0123456789abcdef01234567"
    url: str = ""
    token: str | None = None
    cut: dict[str, list[int]] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    extra: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    log: list[tuple[str, str, str | None]] = field(default_factory=list)

    def bodies(self, name: str) -> list[str | None]:
        """The Range header of each request for the content of `name`."""
        return [
            given
            for method, path, given in self.log
            if method == "GET" and path.endswith(name) and "/api/models" not in path
        ]

    def listing(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git}
            if name.endswith((".safetensors", ".gguf", ".bin")):
                sha = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": sha, "size": len(content), "pointerSize": 130}
            siblings.append(sibling)
        return {
            "id": self.repo,
            "modelId": self.repo,
            "sha": self.commit,
            "siblings": siblings,
            "tags": [],
            "private": False,
        }

    def tree(self) -> list[dict[str, Any]]:
        found = []
        for sibling in self.listing()["siblings"]:
            entry = {"type": "file", "path": sibling["rfilename"], "size": sibling["size"], "oid": sibling["blobId"]}
            if "lfs" in sibling:
                entry["lfs"] = {**sibling["lfs"], "oid": sibling["lfs"]["sha256"]}
            found.append(entry)
        return found

    def etag(self, name: str) -> str:
        sibling = next(entry for entry in self.listing()["siblings"] if entry["rfilename"] == name)
        return str(sibling["lfs"]["sha256"] if "lfs" in sibling else sibling["blobId"])

    def scope_listing(self) -> dict[str, Any]:
        found = [
            {"Path": name, "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest(), "Type": "blob"}
            for name, content in self.files.items()
        ]
        return {"Code": 200, "Data": {"Files": [{"Path": "folder", "Type": "tree"}, *found]}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FileServer

    def log_message(self, *_: object) -> None:
        return

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        state = self.state
        parts = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(parts.path)
        query = urllib.parse.parse_qs(parts.query)
        if "FilePath" in query:
            path = path + "/" + query["FilePath"][0]
        state.log.append((self.command, path, self.headers.get("Range")))
        if path in state.extra:
            kind, body = state.extra[path]
            return self.body(path, body, kind)
        if state.token and self.headers.get("Authorization") != f"Bearer {state.token}":
            return self.plain(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
        if path in (f"/api/models/{state.repo}", f"/api/models/{state.repo}/revision/main"):
            return self.plain(200, state.listing())
        if path == f"/api/models/{state.repo}/tree/{state.commit}":
            return self.plain(200, state.tree())
        if path.startswith(f"/api/models/{state.repo}/revision/"):
            return self.plain(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if path == f"/api/v1/models/{state.repo}/repo/files":
            return self.plain(200, state.scope_listing())
        for prefix in (f"/{state.repo}/resolve/{state.commit}/", f"/api/v1/models/{state.repo}/repo/"):
            if path.startswith(prefix) and path.removeprefix(prefix) in state.files:
                name = path.removeprefix(prefix)
                return self.body(name, state.files[name])
        return self.plain(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})

    def plain(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(key, text)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def body(self, name: str, content: bytes, kind: str = "application/octet-stream") -> None:
        state = self.state
        if name in state.corrupt:
            content = content[:-1] + bytes((content[-1] ^ 1,))
        start = 0
        if given := self.headers.get("Range"):
            start = int(given.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) - start))
        if name in state.files:
            self.send_header("ETag", f'"{state.etag(name)}"')
            self.send_header("X-Repo-Commit", state.commit)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if state.cut.get(name):
            self.wfile.write(content[start : start + state.cut[name].pop(0)])
            self.close_connection = True
            return
        self.wfile.write(content[start:])


@contextmanager
def serve(files: dict[str, bytes], **options: Any) -> Iterator[FileServer]:
    """Run a `FileServer` on a free local port."""
    state = FileServer(files, **options)
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def folder_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
