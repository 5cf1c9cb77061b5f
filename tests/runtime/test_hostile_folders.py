"""Folders that want more than to be read: code that asks to be run, links and names that lead elsewhere, things that
are no files. Each is refused by a sentence that names the place, or left alone; nothing of it runs."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from octavo import LLM, ModelFileError, SamplingParams
from octavo.models.sources import ModelFiles, resolve
from octavo.tokenizer import load_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A model of one's own, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**found, **values}))


def text_of(folder: Path, **settings: Any) -> str:
    with LLM(str(folder), num_blocks=33, device="cpu", dtype="float32", **settings) as llm:
        return llm.generate("abc", SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))[0].text


# -- code ------------------------------------------------------------------------------------------------------------


def test_a_configuration_that_asks_for_code_gets_none_run(folder: Path, tmp_path: Path) -> None:
    """By all names that transformers knows for code, in all files that are read. The model runs as it would without."""
    expected = text_of(folder)
    marker = tmp_path / "ran"
    evil = f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: pass\n"
    named = {"evil", "modeling_evil", "tokenization_evil", "configuration_evil"}
    for name in (*(f"{one}.py" for one in named), "sitecustomize.py", "conftest.py", "__init__.py", "torch.py"):
        (folder / name).write_text(evil)
    loaders = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor")
    classes = dict.fromkeys(loaders, "modeling_evil.Evil")
    ask: dict[str, Any] = {
        "auto_map": classes, "trust_remote_code": True, "_attn_implementation_internal": "evil/kernel",
        "_attn_implementation": "evil/kernel:evil", "attn_implementation": "evil/kernel", "custom_pipelines": {
            "text-generation": {"impl": "evil.Evil", "pt": ["AutoModel"]}}, "use_kernels": True,
        "_experts_implementation": "evil/kernel", "transformers_js_config": {"x": 1},
    }  # fmt: skip
    change(folder / "config.json", **ask)
    change(folder / "generation_config.json", custom_generate="evil", trust_remote_code=True)
    auto = {"auto_map": {"AutoTokenizer": ["tokenization_evil.Evil"] * 2}, "trust_remote_code": True}
    change(folder / "tokenizer_config.json", **auto, tokenizer_class="Evil", processor_class="Evil")
    before = set(sys.modules)
    assert text_of(folder) == expected
    assert not marker.exists()
    assert not {name.rpartition(".")[2] for name in set(sys.modules) - before} & named
    assert str(folder) not in sys.path


def test_only_a_flag_lets_code_of_the_tokenizer_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(marker)!r}).touch()\nclass Evil(PreTrainedTokenizerFast): pass\n"
    )
    auto = {"AutoTokenizer": [None, "evil.Evil"]}
    change(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="Evil")
    text_of(folder)
    assert not marker.exists()
    text_of(folder, trust_remote_code=True)
    assert marker.exists()  # it would have run


# -- links -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path, tiny_model: Path) -> Path:
    """A folder of somebody else's, with files of every kind."""
    return Path(shutil.copytree(tiny_model, tmp_path / "secret"))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "chat_template.jinja"]
)
def test_links_out_of_the_folder_are_refused(folder: Path, secret: Path, name: str, relative: bool) -> None:
    (secret / "chat_template.jinja").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    target = secret / name
    (folder / name).symlink_to(os.path.relpath(target, folder) if relative else target)
    with pytest.raises(ModelFileError, match="leads out of") as caught:
        resolve(str(folder))
    assert caught.value.file == str(folder / name)
    with pytest.raises(ModelFileError, match="leads out of"):
        text_of(folder)


def test_links_below_and_links_to_folders(folder: Path, secret: Path) -> None:
    (secret / "note.jinja").write_text("secret")
    more = folder / "additional_chat_templates"
    more.symlink_to(secret)
    with pytest.raises(ModelFileError, match="leads out of"):
        resolve(str(folder))
    more.unlink()
    more.mkdir()
    (more / "note.jinja").symlink_to(secret / "note.jinja")
    with pytest.raises(ModelFileError, match="leads out of") as caught:
        resolve(str(folder))
    assert caught.value.file == str(more / "note.jinja")


def test_a_chain_of_links_is_followed_to_its_end(folder: Path, secret: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "b.json").symlink_to(secret / "config.json")
    (folder / "config.json").symlink_to("b.json")
    with pytest.raises(ModelFileError, match="leads out of"):
        resolve(str(folder))


def test_links_inside_and_a_link_to_the_folder_are_fine(folder: Path, tmp_path: Path) -> None:
    expected = text_of(folder)
    (folder / "config.json").rename(folder / "real.json")
    (folder / "config.json").symlink_to("real.json")
    (folder / "nowhere.json").symlink_to("missing.json")
    link = tmp_path / "link"
    link.symlink_to(folder)
    (folder / "circle.json").symlink_to("circle.json")
    assert text_of(link) == expected


def cached(folder: Path, home: Path) -> Path:
    """The folder's files in the layout of the Hub's cache: a snapshot of links into the blobs."""
    root = home / "models--org--model"
    snapshot, blobs = root / "snapshots" / COMMIT, root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def test_the_cache_of_the_hub_goes_on_working(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = text_of(folder)
    snapshot = cached(folder, tmp_path / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("org/model").path == snapshot
    assert text_of(snapshot) == expected  # by its path, too
    other = tmp_path / "hub" / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    shutil.copy(folder / "config.json", other / "0")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../models--org--other/blobs/0")
    for name in ("org/model", str(snapshot)):
        with pytest.raises(ModelFileError, match="leads out of"):
            resolve(name)


# -- other names of files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "BertTokenizer", "vocab": "SECRET/vocab.txt"},
        {"tokenizer_class": "GPT2Tokenizer", "vocab": "SECRET/vocab.json", "merges": "SECRET/merges.txt"},
        {"tokenizer_class": "GPT2Tokenizer", "init_inputs": ["SECRET/vocab.json", "SECRET/merges.txt"]},
        {"tokenizer_class": "Qwen2Tokenizer", "gguf_file": "SECRET/x.gguf"},
        {"tokenizer_class": "PreTrainedTokenizerFast", "tokenizer_object": "SECRET/tokenizer.json"},
        {"tokenizer_class": "BertTokenizer", "vocab_file": "SECRET/vocab.txt"},
        {"tokenizer_class": "BertTokenizer", "tokenizer_file": "SECRET/tokenizer.json"},
    ],
)  # fmt: skip
def test_a_tokenizer_reads_no_files_elsewhere(tmp_path: Path, settings: dict[str, Any]) -> None:
    """transformers, which reads the older formats, would take some of these names as they are."""
    secret, folder = tmp_path / "secret", tmp_path / "model"
    secret.mkdir()
    folder.mkdir()
    plain = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"
    (secret / "vocab.txt").write_text(plain + "password\n")
    (secret / "vocab.json").write_text(json.dumps({"password": 0, "a": 1}))
    (secret / "merges.txt").write_text("#version: 0.2\n")
    (folder / "vocab.txt").write_text(plain + "mine\n")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    text = json.dumps(settings).replace("SECRET", str(secret))
    (folder / "tokenizer_config.json").write_text(text)
    files = ModelFiles("m", folder, "safetensors", "local")
    if {"vocab_file", "tokenizer_file"} & set(settings):  # these it takes from the folder, whatever they say
        backend = load_tokenizer(files).backend
        assert backend.token_to_id("password") is None
        assert backend.token_to_id("mine") is not None
        return
    with pytest.raises(ModelFileError, match="names a file") as caught:
        load_tokenizer(files)
    assert caught.value.file == str(folder / "tokenizer_config.json")
    assert caught.value.field in settings


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-2.safetensors", "chat_template.jinja"])
def test_what_is_no_file_is_not_waited_for(folder: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        monkeypatch.chdir(folder)  # a socket's name must be short
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(name)
    began = time.monotonic()
    with pytest.raises(ModelFileError, match="neither a file nor a folder") as caught:
        text_of(folder)
    assert time.monotonic() - began < 2
    assert caught.value.file == str(folder / name)


def test_pickles_beside_nothing_else_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="pickled"):
        text_of(folder)
