"""Files that lie. Each gives a `ModelFileError` that names file and field: no crash, no hang, no huge allocation."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from files_fixtures import llama_metadata, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.models.config import load_config, parse_config
from octavo.models.gguf_file import GGUFFile
from octavo.models.safetensors_file import SafetensorsFile
from octavo.models.sources import ModelFiles
from octavo.models.weights import open_weights
from octavo.tokenizer import load_tokenizer
from safetensors.torch import save_file

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "vocab_size": 50,
}  # fmt: skip


@contextmanager
def quickly(seconds: float = 2.0) -> Iterator[None]:
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < seconds


def safetensors_bytes(header: Any, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int = 0, end: int = 64, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [16] if shape is None else shape, "data_offsets": [start, end]}


BAD_SAFETENSORS: dict[str, tuple[bytes, str | None]] = {
    "empty": (b"", None),
    "seven bytes": (b"\0" * 7, None),
    "header of 2^63": (safetensors_bytes({"a": entry()}, length=1 << 63), "header"),
    "header of 2^64-1": (safetensors_bytes({"a": entry()}, length=(1 << 64) - 1), "header"),
    "header one byte too long": (safetensors_bytes({}, b"", length=3), "header"),
    "not JSON": (safetensors_bytes(b"{nope"), "header"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "header"),
    "a list": (safetensors_bytes([1]), "header"),
    "deep": (safetensors_bytes(b"[" * 200_000), "header"),
    "huge integer": (safetensors_bytes(b'{"a": 1' + b"0" * 9000 + b"}"), "header"),
    "twice": (safetensors_bytes(b'{"a": %(e)s, "a": %(e)s}' % {b"e": json.dumps(entry()).encode()}), "header"),
    "entry is a number": (safetensors_bytes({"a": 3}), "a"),
    "no dtype": (safetensors_bytes({"a": {"shape": [16], "data_offsets": [0, 64]}}), "a"),
    "dtype is a list": (safetensors_bytes({"a": entry(dtype=["F32"])}), "a"),
    "unknown dtype": (safetensors_bytes({"a": entry(dtype="F33")}), "a"),
    "negative dimension": (safetensors_bytes({"a": entry(shape=[-16])}), "a"),
    "fractional dimension": (safetensors_bytes({"a": entry(shape=[16.0])}), "a"),
    "true as a dimension": (safetensors_bytes({"a": entry(0, 4, shape=[True])}), "a"),
    "shape overflows": (safetensors_bytes({"a": entry(shape=[1 << 32, 1 << 32])}), "a"),
    "zero times 2^70": (safetensors_bytes({"a": entry(0, 0, shape=[0, 1 << 70])}), "a"),
    "too short": (safetensors_bytes({"a": entry(shape=[15])}), "a"),
    "ends after the file": (safetensors_bytes({"a": entry(0, 68, shape=[17])}), "a"),
    "starts after the file": (safetensors_bytes({"a": entry(1 << 62, (1 << 62) + 64)}), "a"),
    "backwards": (safetensors_bytes({"a": entry(64, 0)}), "a"),
    "three offsets": (safetensors_bytes({"a": {**entry(), "data_offsets": [0, 32, 64]}}), "a"),
    "overlap": (safetensors_bytes({"a": entry(0, 32, shape=[8]), "b": entry(28, 60, shape=[8])}), "b"),
}


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_unsound_safetensors(tmp_path: Path, case: str) -> None:
    content, field = BAD_SAFETENSORS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with quickly(), pytest.raises(ModelFileError) as caught:
        open_weights(ModelFiles("m", tmp_path, "safetensors", "local"), parse_config(CONFIG))
    assert caught.value.file == str(path)
    assert caught.value.field == field
    assert len(str(caught.value)) < 600


def test_sound_safetensors_with_holes_and_odd_offsets(tmp_path: Path) -> None:
    """Neither gaps nor unaligned data are errors."""
    path = tmp_path / "model.safetensors"
    data = b"\0\0\0" + struct.pack("<3f", 1, 2, 3) + b"\0" * 5
    path.write_bytes(safetensors_bytes({"__metadata__": {"format": "pt"}, "a": entry(3, 15, shape=[3])}, data))
    opened = SafetensorsFile(path)
    assert opened.tensor("a").tolist() == [1, 2, 3]


def sharded(folder: Path, weight_map: Any) -> ModelFiles:
    save_file({"a": torch.ones(4)}, folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return ModelFiles("m", folder, "safetensors", "local")


@pytest.mark.parametrize(
    "shard",
    ["../../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "c:x.safetensors", "x.bin",
     "", "x\0.safetensors", 7, None, ["x.safetensors"]],
)  # fmt: skip
def test_index_cannot_name_files_elsewhere(tmp_path: Path, shard: Any) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(4)}, tmp_path / "x.safetensors")  # what "../../x" would reach
    with pytest.raises(ModelFileError, match="not the name") as caught:
        open_weights(sharded(folder, {"a": shard}), parse_config(CONFIG))
    assert caught.value.file == str(folder / "model.safetensors.index.json")
    assert caught.value.field == "weight_map.a"


def test_index_against_its_shards(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="missing") as caught:
        open_weights(sharded(tmp_path, {"a": "model-00002-of-00002.safetensors"}), parse_config(CONFIG))
    assert str(caught.value.file).endswith("model-00002-of-00002.safetensors")
    with pytest.raises(ModelFileError, match="is not in") as caught:
        open_weights(sharded(tmp_path, {"b": "model-00001-of-00001.safetensors"}), parse_config(CONFIG))
    assert caught.value.field == "b"
    for bad in ({}, [], None, "x"):
        with pytest.raises(ModelFileError) as caught:
            open_weights(sharded(tmp_path, bad), parse_config(CONFIG))
        assert caught.value.field == "weight_map"


def test_pickles_are_not_read(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return (Path.touch, (marker,))

    torch.save({"a": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="pickled"):
        open_weights(ModelFiles("m", tmp_path, "safetensors", "local"), parse_config(CONFIG))
    assert not marker.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert marker.exists()  # the file was dangerous indeed


# -- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small sound file, to be damaged."""
    tokens = ["<s>", *(chr(33 + i) for i in range(40)), '!"']
    metadata = {
        **llama_metadata(),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * 41,
        "tokenizer.ggml.merges": ['! "'],
        "tokenizer.ggml.eos_token_id": 0,
    }
    tensors = {"token_embd.weight": torch.ones(50, 32).numpy(), "output_norm.weight": torch.ones(32).numpy()}
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", metadata, tensors)
    return path.read_bytes()


def use(path: Path) -> None:
    """Everything that the engine does with a GGUF."""
    files = ModelFiles("m", path, "gguf", "local")
    config = load_config(files)
    load_tokenizer(files).check_against(config)
    with open_weights(files, config) as weights:
        for name in weights.names():
            weights.copy_into(name, torch.empty(weights.shape(name)))


def test_the_sound_file_is_sound(tmp_path: Path, gguf_bytes: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes)
    use(path)


@pytest.mark.parametrize("value", [1 << 31, 1 << 62, (1 << 63) + 1, (1 << 64) - 1])
def test_every_length_of_a_gguf_may_lie(tmp_path: Path, gguf_bytes: bytes, value: int) -> None:
    """Write a huge number over each eight bytes of the header in turn."""
    path = tmp_path / "m.gguf"
    header = gguf_bytes.index(b"token_embd.weight") + 60
    survived = unnamed = 0
    with quickly(20):
        for at in range(4, header, 4):
            path.write_bytes(gguf_bytes[:at] + struct.pack("<Q", value) + gguf_bytes[at + 8 :])
            try:
                use(path)
                survived += 1  # it hit text, or a number that may be this large
            except ModelFileError as error:
                unnamed += error.file != str(path)
    assert survived < header // 8
    assert not unnamed


@pytest.mark.parametrize(
    ("offset", "value", "field"),
    [(4, 9, "version"), (8, 1 << 60, "tensor_count"), (8, 1 << 17, None), (16, 1 << 60, "kv_count"), (16, 1000, None)],
)
def test_gguf_counts(tmp_path: Path, gguf_bytes: bytes, offset: int, value: int, field: str | None) -> None:
    path = tmp_path / "m.gguf"
    form = "<I" if offset == 4 else "<Q"
    path.write_bytes(gguf_bytes[:offset] + struct.pack(form, value) + gguf_bytes[offset + struct.calcsize(form) :])
    with quickly(), pytest.raises(ModelFileError) as caught:
        GGUFFile(path)
    assert caught.value.file == str(path)
    if field:
        assert caught.value.field == field


def test_gguf_cut_short_anywhere(tmp_path: Path, gguf_bytes: bytes) -> None:
    path = tmp_path / "m.gguf"
    for length in [*range(0, len(gguf_bytes) - 1, 37), len(gguf_bytes) - 1]:
        path.write_bytes(gguf_bytes[:length])
        with pytest.raises(ModelFileError) as caught:
            use(path)
        assert caught.value.file == str(path)


def test_gguf_huge_and_sparse_array(tmp_path: Path) -> None:
    """A file of a gigabyte of zeros whose header claims arrays as large as the file."""
    key = b"x"
    for item, count in ((8, 1 << 27), (8, 1 << 23), (4, 1 << 28), (9, 1)):
        body = (
            b"GGUF"
            + struct.pack("<IQQ", 3, 0, 1)
            + struct.pack("<Q", len(key))
            + key
            + struct.pack("<IIQ", 9, item, count)
        )
        path = tmp_path / "m.gguf"
        path.write_bytes(body)
        with open(path, "r+b") as stream:
            stream.truncate(1 << 30)
        with quickly(5):
            if count == 1 << 23:  # eight million empty strings are within bounds
                GGUFFile(path).close()
                continue
            with pytest.raises(ModelFileError) as caught:
                GGUFFile(path)
            assert caught.value.field == "x"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_damage_to_a_gguf(tmp_path: Path, gguf_bytes: bytes, damage: list[tuple[int, int]]) -> None:
    data = bytearray(gguf_bytes)
    for at, value in damage:
        data[at % len(data)] = value
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with suppress(ModelFileError):  # anything else is a failure
        use(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_damage_to_a_safetensors(tmp_path: Path, damage: list[tuple[int, int]]) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(3, dtype=torch.bfloat16)}, path)
    data = bytearray(path.read_bytes())
    for at, value in damage:
        data[at % len(data)] = value
    path.write_bytes(data)
    files = ModelFiles("m", tmp_path, "safetensors", "local")
    with suppress(ModelFileError), open_weights(files, parse_config(CONFIG)) as weights:
        for name in weights.names():
            weights.copy_into(name, torch.empty(weights.shape(name)))


def test_unmapped_tensor_and_unknown_type(tmp_path: Path) -> None:
    embedding = torch.ones(50, 32).numpy()
    path = write_gguf(
        tmp_path / "m.gguf", llama_metadata(), {"token_embd.weight": embedding, "blk.0.odd.weight": embedding}
    )
    with pytest.raises(UnsupportedModelError, match="no place") as caught:
        open_weights(ModelFiles("m", path, "gguf", "local"), load_config(ModelFiles("m", path, "gguf", "local")))
    assert caught.value.field == "blk.0.odd.weight"
