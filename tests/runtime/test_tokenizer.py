"""`tokenizer`: the ids of transformers, without its import; and no code from a model's folder."""

# ruff: noqa: F811 - fixtures are imported by name

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from files_fixtures import (
    SENTENCES,
    byte_level_backend,
    default_model,  # noqa: F401 - a fixture
    llama_metadata,
    many_texts,
    sentencepiece_tokens,
    write_gguf,
)
from octavo.errors import ModelFileError, RequestError, UnsupportedModelError
from octavo.models.config import load_config, parse_config
from octavo.models.sources import ModelFiles
from octavo.tokenizer import Tokenizer, load_tokenizer

TEXTS = many_texts(3000)


@pytest.fixture(scope="module")
def ours(default_model: ModelFiles) -> Tokenizer:
    return load_tokenizer(default_model)


@pytest.fixture(scope="module")
def theirs(default_model: ModelFiles) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(default_model.path.parent, gguf_file=default_model.path.name)


def test_default_model_has_the_ids_of_transformers(ours: Tokenizer, theirs: Any) -> None:
    """transformers drops SmolLM2's rule that digits stand alone; with the rule put back, all ids agree.

    Without it they differ only where blanks come before a digit, or where digits beyond ASCII stand together, which the
    last lines pin down.
    """
    from tokenizers import pre_tokenizers

    plain = [theirs(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    backend = theirs.backend_tokenizer
    dropped = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), dropped])
    try:
        expected = [theirs(text)["input_ids"] for text in TEXTS]
    finally:
        backend.pre_tokenizer = dropped
    assert [ours.encode(text) for text in TEXTS] == expected
    for text, ids, bare in zip(TEXTS, expected, plain, strict=True):
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=False) == text
        if ids != bare:
            assert re.search(r"\s\s\d", text) or any(c.isnumeric() and not c.isascii() for c in text), text


def test_known_ids_of_smollm2(ours: Tokenizer) -> None:
    """Figures of the original tokenizer: digits alone, and blanks before them together."""
    assert [ours.token_text(i) for i in ours.encode("x  7\n\n1. 42")] == [
        "x",
        "  ",
        "7",
        "\n\n",
        "1",
        ".",
        " ",
        "4",
        "2",
    ]
    assert ours.encode("<|im_start|>user\n") == [1, 4093, 198]
    assert ours.decode([1, 4093, 198]) == "user\n"
    assert (ours.bos_token_id, ours.eos_token_ids, ours.pad_token_id, ours.vocab_size) == (1, (2,), 2, 49152)
    assert ours.special_ids == frozenset(range(17))
    assert ours.has_chat_template


def test_bytes_of_all_tokens_join_to_the_text(ours: Tokenizer) -> None:
    for text in TEXTS[:500]:
        assert b"".join(ours.token_bytes(i) for i in ours.encode(text)) == text.encode()
    assert ours.token_bytes(10**6) == ours.token_bytes(-1) == b""
    assert ours.token_text(ours.encode("é👩")[-1]) == "\ufffd"


def test_hf_is_the_same_tokenizer(ours: Tokenizer) -> None:
    hf = ours.hf
    assert hf is ours.hf
    assert all(hf(text)["input_ids"] == ours.encode(text) for text in SENTENCES)
    assert (hf.eos_token_id, hf.bos_token_id, hf.pad_token_id) == (2, 1, 2)
    padded = hf(["a", "a long text of many tokens"], padding=True, truncation=True, max_length=3)["input_ids"]
    assert [len(ids) for ids in padded] == [3, 3]
    assert len(ours.encode("a long text of many tokens")) > 3  # what transformers set did not reach ours


def test_loads_without_torch_and_quickly(default_model: ModelFiles) -> None:
    code = f"""
import time; start = time.perf_counter()
from pathlib import Path
from octavo.models.sources import ModelFiles
from octavo.tokenizer import load_tokenizer
tokenizer = load_tokenizer(ModelFiles("m", Path({str(default_model.path)!r}), "gguf", "local"))
tokenizer.encode("hello"); tokenizer.apply_chat_template([{{"role": "user", "content": "hi"}}])
seconds = time.perf_counter() - start
import sys
print(seconds, [name for name in ("torch", "transformers", "huggingface_hub") if name in sys.modules])
"""
    runs: list[float] = []
    while len(runs) < 5 and (not runs or min(runs) >= 0.8):  # again if it was slow: others share this machine
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds, imported = done.stdout.split(" ", 1)
        assert imported.strip() == "[]"
        runs.append(float(seconds))
    assert min(runs) < 0.8


def test_several_threads(ours: Tokenizer) -> None:
    expected = [ours.encode(text) for text in TEXTS[:300]]
    wrong: list[str] = []

    def work() -> None:
        for text, ids in zip(TEXTS[:300], expected, strict=True):
            if ours.encode(text) != ids or ours.decode(ids, skip_special_tokens=False) != text:
                wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_bad_input_is_a_request_error(ours: Tokenizer) -> None:
    for bad in ("\ud800", b"bytes", None, 3, ["a"]):
        with pytest.raises(RequestError) as caught:
            ours.encode(bad)  # type: ignore[arg-type]
        assert caught.value.field == "prompt"
    with pytest.raises(RequestError):
        ours.decode([-1])
    assert ours.decode([10**6, 19556]) == "Hello"


def test_check_against(ours: Tokenizer, default_model: ModelFiles) -> None:
    config = load_config(default_model)
    ours.check_against(config)
    small = parse_config({"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                          "num_attention_heads": 1, "vocab_size": 49151})  # fmt: skip
    with pytest.raises(ModelFileError, match="49151") as caught:
        ours.check_against(small)
    assert caught.value.field == "vocab_size"


# -- folders ----------------------------------------------------------------------------------------------------------


def folder(path: Path, settings: dict[str, Any] | None = None, backend: Any = None) -> ModelFiles:
    """A folder with tokenizer.json and tokenizer_config.json, saved by transformers and then changed by `settings`."""
    from transformers import PreTrainedTokenizerFast

    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend or byte_level_backend(), eos_token="<|im_end|>", bos_token="<|endoftext|>"
    )
    hf.save_pretrained(path)
    config_path = path / "tokenizer_config.json"
    config = {**json.loads(config_path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast", **(settings or {})}
    config_path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return ModelFiles("m", path, "safetensors", "local")


def added(content: str, special: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, "special": special, **flags}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False, "pad_token": "<pad>"},
        {"added_tokens_decoder": {"600": added("<tool>", False), "601": added("<ctl>", True)}},
        {"additional_special_tokens": ["<x>", "<y>"], "unk_token": added("<unk>", True)},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_folder_agrees_with_auto_tokenizer(tmp_path: Path, settings: dict[str, Any]) -> None:
    from transformers import AutoTokenizer

    files = folder(tmp_path, settings)
    ours, theirs = load_tokenizer(files), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.pad_token_id) == (theirs.bos_token_id, theirs.pad_token_id)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    for text in [*TEXTS[:300], "a<tool>b<ctl>c <x><y> <pad><unk>"]:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs(text, add_special_tokens=special)["input_ids"], text
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_limits_in_tokenizer_json_do_not_cut_prompts(tmp_path: Path) -> None:
    backend = byte_level_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    ours = load_tokenizer(folder(tmp_path, backend=backend))
    assert 4 < len(ours.encode("a text of more than four tokens")) < 64


def test_templates_in_files(tmp_path: Path) -> None:
    files = folder(tmp_path, {"chat_template": "from the config"})
    messages = [{"role": "user", "content": "hi"}]
    assert load_tokenizer(files).apply_chat_template(messages) == "from the config"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }} {{ eos_token }}")
    assert load_tokenizer(files).apply_chat_template(messages) == "file hi <|im_end|>"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools {{ tools | length }}")
    tokenizer = load_tokenizer(files)
    tool = {"type": "function", "function": {"name": "f"}}
    assert tokenizer.apply_chat_template(messages) == "file hi <|im_end|>"
    assert tokenizer.apply_chat_template(messages, tools=[tool]) == "tools 1"
    assert tokenizer.apply_chat_template(messages, chat_template="tool_use", tools=[tool]) == "tools 1"
    assert tokenizer.apply_chat_template(messages, chat_template="own {{ x }}", x=3) == "own 3"
    assert tokenizer.hf.apply_chat_template(messages, tokenize=False) == "file hi <|im_end|>"


def test_named_templates_in_the_config(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    tokenizer = load_tokenizer(folder(tmp_path, {"chat_template": named}))
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.chat_template == "d"
    assert tokenizer.apply_chat_template(messages, tools=[{"name": "f"}]) == "t"


def test_no_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert caught.value.field == "chat_template"


@pytest.mark.parametrize("with_json", [True, False])
def test_a_folder_cannot_run_its_code(tmp_path: Path, with_json: bool) -> None:
    """auto_map, and settings that ask to be trusted: the code runs when the caller says so, and never else."""
    marker = tmp_path / "ran"
    ask = {
        "auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]},
        "trust_remote_code": True,
        "tokenizer_class": "EvilTokenizer",
    }
    files = folder(tmp_path, ask)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "trust_remote_code": True}))
    (tmp_path / "evil.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(marker)!r}).touch()\nclass EvilTokenizer(PreTrainedTokenizerFast): pass\n"
    )
    if with_json:
        load_tokenizer(files)
    else:
        saved = (tmp_path / "tokenizer.json").rename(tmp_path / "saved")
        with pytest.raises(ModelFileError):
            load_tokenizer(files)
        saved.rename(tmp_path / "tokenizer.json")
    assert not marker.exists()
    tokenizer = load_tokenizer(files, trust_remote_code=True)
    assert marker.exists()  # the code would have run
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


def test_fallback_to_transformers(tmp_path: Path) -> None:
    """A folder in an older format, vocab.json and merges.txt, without tokenizer.json."""
    backend = byte_level_backend()
    saved = json.loads(backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(saved["vocab"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in saved["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = load_tokenizer(ModelFiles("m", tmp_path, "safetensors", "local"))
    text = "The capital of France is Paris."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.is_byte_level


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": 1}, "merges": ["a b"]}}'),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"9": {"content": 4}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": 3}'),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "x"}]}'),
    ],
)
def test_unsound_tokenizer_files(tmp_path: Path, name: str, content: str) -> None:
    files = folder(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ModelFileError):
        load_tokenizer(files)


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError):
        load_tokenizer(ModelFiles("m", tmp_path, "safetensors", "local"))


# -- other GGUF vocabularies ------------------------------------------------------------------------------------------


def gguf(path: Path, metadata: dict[str, Any]) -> ModelFiles:
    import numpy as np

    tensors = {"token_embd.weight": np.zeros((len(metadata["tokenizer.ggml.tokens"]), 32), dtype=np.float32)}
    return ModelFiles("m", write_gguf(path / "m.gguf", {**llama_metadata(), **metadata}, tensors), "gguf", "local")


def byte_level_metadata(pre: str, **changes: Any) -> dict[str, Any]:
    model = json.loads(byte_level_backend().to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 4, *([1] * (len(tokens) - 4))],
        "tokenizer.ggml.merges": [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        **changes,
    }


def their_gguf_tokenizer(files: ModelFiles) -> Any:
    reason = "this transformers does not read tokenizer.ggml.pre and add_bos_token"
    pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping", reason=reason)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(files.path.parent, gguf_file=files.path.name)


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "tekken", "gpt-2"])
def test_byte_level_gguf_agrees_with_transformers(tmp_path: Path, pre: str) -> None:
    """With what transformers leaves out put back: Qwen's NFC, and llama 3's whole words."""
    from tokenizers import normalizers

    files = gguf(tmp_path, byte_level_metadata(pre, **{"tokenizer.ggml.add_bos_token": False}))
    ours, theirs = load_tokenizer(files), their_gguf_tokenizer(files)
    backend = theirs.backend_tokenizer
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    if pre in ("llama-bpe", "tekken"):
        backend.model.ignore_merges = True
    assert [ours.encode(text) for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]


def test_begin_tokens_and_turn_ends(tmp_path: Path) -> None:
    ends = {"tokenizer.ggml.eot_token_id": 1, "tokenizer.chat_template": "x"}
    llama3 = load_tokenizer(gguf(tmp_path, byte_level_metadata("llama-bpe", **ends)))
    assert llama3.encode("a")[0] == 0  # llama 3 begins with its BOS unless the file says no
    assert llama3.encode("a", add_special_tokens=False)[0] != 0
    assert llama3.eos_token_ids == (2, 1)
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    ids = load_tokenizer(gguf(tmp_path, byte_level_metadata("smollm", **both))).encode("a")
    assert (ids[0], ids[-1], len(ids)) == (0, 2, 3)


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    tokens, scores, types = sentencepiece_tokens()
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **changes,
    }


def test_sentencepiece_gguf_agrees_with_transformers(tmp_path: Path) -> None:
    files = gguf(tmp_path, sentencepiece_metadata())
    ours, theirs = load_tokenizer(files), their_gguf_tokenizer(files)
    assert not ours.is_byte_level
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.encode("hello")[0] == 1
    assert ours.token_bytes(3 + 0xE4) == b"\xe4"
    assert any(ours.token_text(i).startswith(" ") for i in ours.encode("the capital of"))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.model": 3}, "tokenizer.ggml.model"),
        ({"tokenizer.ggml.pre": "from-the-future"}, "tokenizer.ggml.pre"),
        ({"tokenizer.ggml.merges": ["ab"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": [1, 2]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id"),
        ({"tokenizer.ggml.bos_token_id": "x"}, "tokenizer.ggml.bos_token_id"),
    ],
)
def test_unsound_gguf_vocabularies(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        load_tokenizer(gguf(tmp_path, byte_level_metadata("smollm", **changes)))
    assert (caught.value.file, caught.value.field) == (str(tmp_path / "m.gguf"), field)
    assert isinstance(caught.value, UnsupportedModelError) == (field in ("tokenizer.ggml.model", "tokenizer.ggml.pre"))
