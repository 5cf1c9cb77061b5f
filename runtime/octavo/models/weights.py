"""Weights by name, whatever file holds them. Called by the loader, which owns the destinations.

A reader knows the tensors of a model under their Hugging Face names and copies one at a time into memory that the
caller allocated (on any device, of any floating dtype, often a slice of a fused matrix). No second copy of a whole
tensor is made: safetensors are copied out of a memory map, GGUF tensors are dequantised some rows at a time.
"""

from __future__ import annotations

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, Self

import torch

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.models.config import ModelConfig, read_json
from octavo.models.gguf_file import GGUFFile, TensorInfo
from octavo.models.mapped import drop_pages
from octavo.models.safetensors_file import SafetensorsFile
from octavo.models.sources import ModelFiles

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class WeightReader(Protocol):
    """The tensors of a model. Use as a context manager, or call `close`."""

    place: str
    """The file or folder, for messages."""

    def names(self) -> list[str]:
        """Hugging Face names, such as "model.layers.0.self_attn.q_proj.weight"."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor. Raises `ModelFileError` when the model has no tensor of this name."""

    def check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        """`ModelFileError` naming both shapes where they differ."""

    def copy_into(self, name: str, dest: torch.Tensor) -> None:
        """Copy one tensor into `dest`, converting its dtype. `ModelFileError` if it is missing or shapes differ."""

    def blocks(self, name: str) -> tuple[torch.Tensor, str] | None:
        """The blocks of a quantised matrix as they are in the file, uint8 `[rows, bytes of a row]`, and their type;
        None where there are none that the kernels for packed weights know."""

    def pieces(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        """A matrix in order, as float32 `[n, columns]` of its own memory: about `rows` rows at a time."""

    def forget(self, name: str) -> None:
        """This tensor was copied: the pages of its file need not stay in memory. It can still be read."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_weights(files: ModelFiles, config: ModelConfig) -> WeightReader:
    """Open the weights of a resolved model. `ModelFileError` if a file is missing, truncated or contradictory."""
    return GGUFWeights(files.path, config) if files.format == "gguf" else open_folder(files)


def open_folder(files: ModelFiles) -> WeightReader:
    """The weights of a model that is no GGUF file. Pickled ones only where there are no others and the user allowed it.
    """
    if files.allow_pickle and not any(files.path.glob("*.safetensors")):
        from octavo.models.pickled import PickledWeights

        return PickledWeights(files.path)
    return SafetensorsWeights(files.path)


def open_dummy(seed: int = 0, shapes: Mapping[str, tuple[int, ...]] | None = None) -> WeightReader:
    """Weights of no model: small deterministic noise, ones for norms. For tests and benchmarks of speed."""
    return DummyWeights(seed, shapes or {})


class Reader(ABC):
    """What all readers share: the context manager and the errors."""

    place = ""

    def blocks(self, name: str) -> tuple[torch.Tensor, str] | None:
        return None

    def forget(self, name: str) -> None:
        return

    def close(self) -> None:
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _missing(self, name: str) -> ModelFileError:
        return ModelFileError("the model has no tensor of this name", file=self.place, field=name)

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    def check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        shape = self.shape(name)
        if wanted != shape:
            message = f"has shape {list(shape)}, but the configuration asks for {list(wanted)}"
            raise ModelFileError(message, file=self.place, field=name)


class TensorReader(Reader):
    """Of files that hold tensors as torch has them."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """One that is there, as it stands in the file."""

    @torch.no_grad()
    def copy_into(self, name: str, dest: torch.Tensor) -> None:
        self.check_shape(name, tuple(dest.shape))
        copy_tensor(self._numbers(name), dest)

    @torch.no_grad()
    def pieces(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        self.shape(name)
        for piece in torch.split(self._numbers(name), rows):
            yield piece.to(torch.float32, copy=True)

    def _numbers(self, name: str) -> torch.Tensor:
        source = self.tensor(name)
        if not source.is_floating_point():
            raise UnsupportedModelError(
                f"holds {source.dtype}, not floating-point weights", file=self.place, field=name
            )
        return source


class SafetensorsWeights(TensorReader):
    """A folder with `model.safetensors`, or with `model.safetensors.index.json` and its shards."""

    def __init__(self, folder: Path) -> None:
        self.place = str(folder)
        self._where: dict[str, SafetensorsFile] = {}
        self._files: list[SafetensorsFile] = []
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        try:
            if index.is_file():
                self._open_shards(folder, index)
            elif single.is_file():
                self._add(SafetensorsFile(single))
            else:
                for path in sorted(folder.glob("*.safetensors")):
                    self._add(SafetensorsFile(path))
                if not self._files:
                    raise _no_weights(folder)
        except BaseException:
            self.close()
            raise

    def _add(self, opened: SafetensorsFile) -> None:
        self._files.append(opened)
        for name in opened.entries:
            if name in self._where:
                raise ModelFileError(f"is also in {self._where[name].path.name}", file=str(opened.path), field=name)
            self._where[name] = opened

    def _open_shards(self, folder: Path, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFileError("must be an object from names to files", file=str(index), field="weight_map")
        opened: dict[str, SafetensorsFile] = {}
        for name, shard in weight_map.items():
            # a shard is a plain name beside the index: anything else would let a model read files elsewhere
            if not isinstance(shard, str) or not shard.endswith(".safetensors") or re.search(r"[/\\\x00:]", shard):
                message = (
                    f"names the shard {str(shard)[:80]!r}, which is not the name of a .safetensors file in this folder"
                )
                raise ModelFileError(message, file=str(index), field=f"weight_map.{name[:80]}")
            if shard not in opened:
                opened[shard] = SafetensorsFile(folder / shard)
                self._files.append(opened[shard])
            if name not in opened[shard].entries:
                raise ModelFileError(f"is not in {shard}, where the index puts it", file=str(index), field=name)
            self._where[name] = opened[shard]

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._where:
            raise self._missing(name)
        return self._where[name].entries[name].shape

    def tensor(self, name: str) -> torch.Tensor:
        return self._where[name].tensor(name)

    def forget(self, name: str) -> None:
        self._where[name].forget(name)

    def close(self) -> None:
        for opened in self._files:
            opened.close()
        self._where, self._files = {}, []


def _no_weights(folder: Path) -> ModelFileError:
    pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
    if pickles:
        message = (
            f"holds only pickled weights ({pickles[0]}), which can run code when read: convert them to safetensors, or "
            "allow them by allow_pickle=True, which makes tensors of them and refuses all else"
        )
        return UnsupportedModelError(message, file=str(folder))
    return ModelFileError("holds no .safetensors weights", file=str(folder))


# llama.cpp's names -> Hugging Face names; in a layer, and outside
_GGUF_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GGUF_NAME = re.compile(r"(?:blk\.(\d{1,5})\.)?(\w+)\.(weight|bias)")


def _hf_name(name: str) -> str | None:
    match = _GGUF_NAME.fullmatch(name)
    if not match:
        return None
    layer, part, kind = match.groups()
    mapped = _GGUF_TOP.get(part) if layer is None else _GGUF_LAYER.get(part)
    return mapped and (f"{mapped}.{kind}" if layer is None else f"model.layers.{layer}.{mapped}.{kind}")


class GGUFWeights(Reader):
    """A GGUF file under Hugging Face names, dequantised on the way out."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self.place = str(path)
        self._file = GGUFFile(path)
        self._where: dict[str, TensorInfo] = {}
        for info in self._file.tensors.values():
            name = _hf_name(info.name)
            if name:
                self._where[name] = info
            elif info.name not in ("rope_freqs.weight",):
                self._file.close()
                raise UnsupportedModelError("this tensor has no place in the model", file=self.place, field=info.name)
        # llama.cpp keeps the q and k rows of "llama" files in interleaved rotary order, and the others as they were
        permuted = self._file.metadata.get("general.architecture") == "llama"
        self._heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if permuted else {}

    def names(self) -> list[str]:
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._where:
            raise self._missing(name)
        return self._where[name].shape

    def copy_into(self, name: str, dest: torch.Tensor) -> None:
        self.check_shape(name, tuple(dest.shape))
        self._copy_rows(name, 0, dest)

    def pieces(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        count, columns = self.shape(name)
        head = self._head_rows(name, count)
        step = max(rows // head, 1) * head
        for first in range(0, count, step):
            piece = torch.empty(min(step, count - first), columns, dtype=torch.float32)
            self._copy_rows(name, first, piece)
            yield piece

    def _head_rows(self, name: str, rows: int) -> int:
        """Rows that belong together because their order changes: a head's, or 1."""
        heads = self._heads.get(name.split(".")[-2], 0)
        if heads and rows % (2 * heads):
            raise ModelFileError(f"{rows} rows do not divide into {heads} heads", file=self.place, field=name)
        return rows // heads if heads else 1

    @torch.no_grad()
    def _copy_rows(self, name: str, first: int, dest: torch.Tensor) -> None:
        """From row `first` (of whole heads) as many rows as `dest` has."""
        from octavo.models.gguf_quants import dequantised_rows

        info = self._where[name]
        rows, columns, target = (dest.shape[0], dest.shape[-1], dest) if dest.ndim == 2 else (1, len(dest), dest[None])
        step = self._head_rows(name, info.shape[0])
        if step > 1 and dest.ndim == 1:  # a bias is permuted as a column
            rows, columns, target = columns, 1, dest.unsqueeze(1)
        raw = _bytes_of(self._file, info)
        if first or len(dest) < info.shape[0]:
            raw = raw.view(info.shape[0], -1)[first : first + rows].view(-1)
        try:
            at = 0
            for piece in dequantised_rows(raw, info.type_name, rows, columns, step):
                count = len(piece)
                into = target[at : at + count]
                if step > 1 and count < step:  # a part of a head: stored [pair, half], wanted [half, pair]
                    head, pair = at // step * step, at % step // 2
                    into = target[head : head + step].view(2, step // 2, columns)[:, pair : pair + count // 2]
                    piece = piece.view(-1, 2, columns).transpose(0, 1)
                elif step > 1:  # stored [head, pair, half], wanted [head, half, pair]
                    piece = piece.view(-1, step // 2, 2, columns).transpose(1, 2)
                    into = into.view(-1, 2, step // 2, columns)
                copy_tensor(piece, into)
                at += count
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"type {info.type_name} is not implemented", file=self.place, field=name
            ) from error

    def blocks(self, name: str) -> tuple[torch.Tensor, str] | None:
        info = self._where.get(name)
        if info is None:
            raise self._missing(name)
        if info.type_name not in ("Q4_0", "Q4_1", "Q8_0") or len(info.shape) != 2:
            return None
        rows = _bytes_of(self._file, info).view(info.shape[0], -1)
        step = self._head_rows(name, len(rows))
        if step > 1:  # stored [head, pair, half], wanted [head, half, pair]
            rows = rows.view(-1, step // 2, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
        return rows, info.type_name

    def forget(self, name: str) -> None:
        info = self._where[name]
        drop_pages(self._file.data, info.offset, info.offset + info.nbytes)

    def close(self) -> None:
        self._where = {}
        self._file.close()


def _bytes_of(file: GGUFFile, info: TensorInfo) -> torch.Tensor:
    import warnings

    with warnings.catch_warnings():  # the map is read-only, and nothing writes to it
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(memoryview(file.data)[info.offset : info.offset + info.nbytes], dtype=torch.uint8)


def copy_tensor(source: torch.Tensor, dest: torch.Tensor) -> None:
    """Copy with conversion; to another device, convert first so that the smaller form travels."""
    if dest.device != source.device and dest.element_size() < source.element_size():
        source = source.to(dest.dtype)
    dest.copy_(source)


class DummyWeights(Reader):
    """Deterministic noise of scale 0.02, ones for norms, zeros for biases. `names` lists the `shapes` it was given."""

    def __init__(self, seed: int = 0, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.place = "dummy weights"
        self._seed, self._shapes = seed, dict(shapes or {})

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise self._missing(name)
        return self._shapes[name]

    @torch.no_grad()
    def copy_into(self, name: str, dest: torch.Tensor) -> None:
        if name in self._shapes:
            self.check_shape(name, tuple(dest.shape))
        if "norm" in name:
            dest.fill_(1.0)
        elif name.endswith(".bias"):
            dest.zero_()
        else:  # seeded by the name, so that the order of loading does not matter
            seed = self._seed * 1000003 + zlib.crc32(name.encode())
            if dest.is_cuda:  # other numbers than on the CPU, which takes 30 s for those of 8 billion parameters
                dest.normal_(0.0, 0.02, generator=torch.Generator(dest.device).manual_seed(seed))
            else:
                noise = torch.empty(dest.shape).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
                copy_tensor(noise, dest)

    def pieces(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        whole = torch.empty(self.shape(name), dtype=torch.float32)
        self.copy_into(name, whole)
        yield from torch.split(whole, rows)
