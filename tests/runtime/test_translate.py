"""Translation: models as they are published, with their own tokenizers, give what transformers gives; languages by any
name; no blank is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny_translators as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo import LLM, AsyncLLM, SamplingParams
from octavo.errors import ConfigError, ModelFileError, RequestError, UnsupportedModelError
from octavo.models.seq2seq_config import load_seq2seq_config
from octavo.models.sources import resolve
from octavo.translation.languages import Languages, language_name, parse
from octavo.translation.scheme import Scheme, load_scheme
from octavo.translation.sentences import cut, shortened

KINDS = {
    "nllb": tiny.nllb,
    "m2m100": tiny.m2m100,
    "marian": tiny.marian,
    "marian-many": lambda folder: tiny.marian(folder, (">>fra<<", ">>deu<<")),
    "t5": tiny.t5,
    "madlad": lambda folder: tiny.t5(folder, ("<2fr>", "<2de>"), "t5-v1.1"),
}
TOLD = {
    "nllb": ("English", "fr"), "m2m100": ("eng_Latn", "French"), "marian": (None, None), "marian-many": ("en", "fra"),
    "t5": ("en", "French"), "madlad": (None, "French"),
}  # fmt: skip
TEXTS = [
    "The quick fox. It jumps!", "Numbers 12 and 1234", "Ein Satz: Übermut, größer. 🙂", "", "dog", "x" * 40,
    "Où est la gare ?", "これは文です。", " a  b ",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """kind -> (folder, transformers' model, its tokenizer, our scheme)."""

    @cache
    def make(kind: str) -> tuple[Path, Any, Any, Scheme]:
        folder = tmp_path_factory.mktemp(kind)
        model, tokenizer = KINDS[kind](folder)
        files = resolve(str(folder))
        return folder, model, tokenizer, load_scheme(files, load_seq2seq_config(files), trust_remote_code=False)

    return make


@pytest.fixture(scope="module")
def engines(made: Any) -> Iterator[Any]:
    opened: dict[str, LLM] = {}

    def engine(kind: str) -> LLM:
        if kind not in opened:
            opened[kind] = LLM(str(made(kind)[0]), dtype="float32", num_blocks=200)
        return opened[kind]

    yield engine
    for llm in opened.values():
        llm.close()


def asked(kind: str, tokenizer: Any, text: str) -> tuple[list[int], int | None]:
    """A source as transformers' tokenizer makes it for the languages of `TOLD`, and the forced first token."""
    if kind in ("nllb", "m2m100"):
        english, french = ("eng_Latn", "fra_Latn") if kind == "nllb" else ("en", "fr")
        tokenizer.src_lang = english
        token = french if kind == "nllb" else "__fr__"
        return tokenizer(text).input_ids, tokenizer.convert_tokens_to_ids(token)
    before = {"marian": "", "marian-many": ">>fra<< ", "t5": "translate English to French: ", "madlad": "<2fr> "}
    return tokenizer(before[kind] + text).input_ids, None


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_models_own_tokenizer(made: Any, kind: str) -> None:
    _, _, tokenizer, scheme = made(kind)
    codes = scheme.languages(*TOLD[kind])
    for text in TEXTS:
        ids, forced = asked(kind, tokenizer, text)
        assert scheme.source_ids(text, *codes) == ids, text
        start = scheme.config.decoder_start_token_id
        assert scheme.prompt_ids(codes[1]) == ([start] if forced is None else [start, forced])
        plain = [token for token in ids if token not in scheme.tokenizer.special_ids]
        assert scheme.tokenizer.decode(ids).strip() == tokenizer.decode(plain).strip()


@pytest.mark.parametrize("kind", KINDS)
def test_translations_are_those_of_transformers(made: Any, engines: Any, kind: str) -> None:
    _, model, tokenizer, _ = made(kind)
    source, target = TOLD[kind]
    texts = [text for text in TEXTS if text.strip() and "." not in text[:-1]]
    found = engines(kind).translate(texts, source=source, target=target, max_tokens=12)
    searched = engines(kind).translate(texts, source=source, target=target, max_tokens=12, beam_width=4)
    found, texts, widths = [*found, *searched], texts * 2, [1] * len(texts) + [4] * len(texts)
    for text, output, width in zip(texts, found, widths, strict=True):
        ids, forced = asked(kind, tokenizer, text.strip())
        expected = model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=12 + (forced is not None), num_beams=width, do_sample=False,
            forced_bos_token_id=forced, forced_eos_token_id=None,
        )[0].tolist()  # fmt: skip
        (sentence,) = output.sentences
        made = sentence.prompt_token_ids + sentence.outputs[0].token_ids
        assert made == expected[: len(made)]
        assert set(expected[len(made) :]) <= {model.config.pad_token_id}
        assert sentence.source_token_ids == ids
        ours = engines(kind).tokenizer  # M2M100 has room for tokens that do not exist
        plain = [token for token in expected if token not in ours.special_ids and token < ours.vocab_size]
        assert output.text.strip() == tokenizer.decode(plain).strip()
        assert output.truncated == (made[-1] != model.config.eos_token_id)


def test_texts_keep_their_shape(engines: Any) -> None:
    llm = engines("marian")
    text = "\n  The fox runs. It jumps!\n\n\tDer Hund.\r\n   \n"
    (output,) = llm.translate(text, max_tokens=5)
    assert len(output.sentences) == 3
    first, second, third = (sentence.text.strip() for sentence in output.sentences)
    assert output.text == f"\n  {first} {second}\n\n\t{third}\r\n   \n"
    assert llm.translate(["", " \n ", "\t"]) == llm.translate(["", " \n ", "\t"])
    assert [blank.text for blank in llm.translate(["", " \n ", "\t"])] == ["", " \n ", "\t"]
    assert "".join(llm.translate(text, max_tokens=5, stream=True)) == output.text
    assert list(llm.translate(" \n ", stream=True)) == [" \n "]
    assert len(list(llm.translate(text, max_tokens=5, stream=True))) == 3


def test_other_translations_of_each_sentence(engines: Any) -> None:
    params = SamplingParams(use_beam_search=True, beam_width=4, n=3, max_tokens=5)
    (output,) = engines("marian").translate("The fox runs. It jumps!", sampling_params=params)
    (best,) = engines("marian").translate("The fox runs. It jumps!", beam_width=4, max_tokens=5)
    assert output.text == best.text
    for sentence in output.sentences:
        assert len({tuple(found.token_ids) for found in sentence.outputs}) == 3
        scores = [found.score for found in sentence.outputs]
        assert scores == sorted(scores, reverse=True)


def test_which_languages_a_model_knows(made: Any) -> None:
    known = {kind: made(kind)[3].known() for kind in KINDS}
    assert len(known["nllb"][0]) == 202
    assert {"fr", "zh", "zh-Hant", "fo", "ace-Arab"} < {*known["nllb"][0]}
    assert len(known["m2m100"][0]) == 100
    assert {"fr", "zh", "nso"} < {*known["m2m100"][0]}
    assert known["marian"] == (("en",), ("de",))
    assert known["marian-many"][0] is known["madlad"][0] is None
    assert {"fr", "de"} <= {*known["marian-many"][1]}
    assert known["t5"] == (None, None)
    for kind in ("nllb", "m2m100"):
        scheme = made(kind)[3]
        assert known[kind][0] == known[kind][1]
        assert {scheme.languages(tag, tag) for tag in known[kind][0]} == {(code, code) for code in scheme.tokens}
        assert len({language_name(tag) for tag in known[kind][0]}) == len(known[kind][0])


def test_sentences_longer_than_the_model_reads_are_cut(engines: Any) -> None:
    llm = engines("marian")
    text = "fox dog " * 200 + "end." + "\n"
    (output,) = llm.translate(text, max_tokens=3)
    assert len(output.sentences) > 3
    assert output.text.endswith("\n")
    longest = max(len(sentence.source_token_ids or ()) for sentence in output.sentences)
    assert llm.engine.limits.max_model_len // 2 < longest <= llm.engine.limits.max_model_len
    with pytest.raises(RequestError, match="reads 96 at most"):
        llm.generate(text)


def test_a_source_must_fit_into_the_cache(made: Any) -> None:
    with LLM(str(made("marian")[0]), dtype="float32", num_blocks=6, block_size=16) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        (output,) = llm.generate([{"prompt_token_ids": [5] * 50}], params)
        assert len(output.outputs[0].token_ids) == 15  # one block of five is left, for these and the start
        with pytest.raises(RequestError, match="num_blocks"):
            llm.generate([{"prompt_token_ids": [5] * 70}], params)


def test_asyncio(made: Any) -> None:
    async def run() -> None:
        async with await AsyncLLM.create(str(made("nllb")[0]), dtype="float32", num_blocks=200) as llm:
            told: dict[str, Any] = {"source": "en", "target": "de", "max_tokens": 6}
            text = "The fox runs. It jumps!\n\nIt sleeps."
            one, two = await asyncio.gather(llm.translate(text, **told), llm.translate([text, "dog"], **told))
            assert one[0].text == two[0].text
            pieces = [piece async for piece in llm.translate_stream(text, **told)]
            assert "".join(pieces) == one[0].text
            assert len(pieces) == 3
            stream = llm.translate_stream(text * 20, **told)
            await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
            await asyncio.sleep(0.2)
            assert llm.stats().running == llm.stats().blocks_used == 0

    asyncio.run(run())


def test_the_command_line(made: Any, tmp_path: Path) -> None:
    from octavo.cli.app import app
    from typer.testing import CliRunner

    folder, text = str(made("nllb")[0]), "The fox runs.\n\n It jumps!\n"
    told = ["--target", "French", "-n", "5", "-m", folder, "--dtype", "float32"]
    with LLM(folder, dtype="float32") as llm:
        expected = llm.translate(text, target="French", max_tokens=5)[0]
    done = CliRunner().invoke(app, ["translate", "-", *told], input=text)
    assert done.exit_code == 0, done.output
    assert done.stdout == expected.text
    (tmp_path / "text").write_text(text)
    done = CliRunner().invoke(app, ["translate", "--file", str(tmp_path / "text"), "--json", *told])
    found = json.loads(done.stdout)
    assert found["text"] == expected.text
    assert len(found["sentences"]) == 2
    for wrong, code in (["--target", "Franch"], 1), (["--file", str(tmp_path / "none")], 2):
        assert CliRunner().invoke(app, ["translate", *told, *wrong], input="x").exit_code == code


def test_requests_of_many_languages_share_a_batch(engines: Any) -> None:
    llm = engines("nllb")
    prompts = [
        {"prompt": text, "source": "en", "target": target} for text in ("The fox.", "A dog") for target in
        ("fra_Latn", "German", "ja", "zh-TW")
    ]  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=2)
    together = llm.generate(prompts, params)
    assert [output.prompt_token_ids[1] for output in together[:4]] == [
        llm.tokenizer.backend.token_to_id(code) for code in ("fra_Latn", "deu_Latn", "jpn_Jpan", "zho_Hant")
    ]
    for prompt, output in zip(prompts, together, strict=True):
        (alone,) = llm.generate(prompt, params)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
    many = llm.generate(prompts[0], SamplingParams(n=4, temperature=1.0, max_tokens=6, seed=3))[0]
    assert len({output.text for output in many.outputs}) > 1
    bare = llm.generate({"prompt_token_ids": [5, 6, 2], "decoder_prompt_token_ids": [2, 9]}, params)[0]
    assert bare.prompt_token_ids == [2, 9]
    assert bare.source_token_ids == [5, 6, 2]


def test_a_chat_model_translates_by_a_prompt() -> None:
    with LLM(str(_chat_folder()), dtype="float32", num_blocks=200) as llm:
        text = "The fox.\n\n  It runs."
        (output,) = llm.translate(text, source="en", target="fr", max_tokens=4)
        assert len(output.sentences) == 2
        assert "from English into French" in str(output.sentences[0].prompt)
        assert "It runs." in str(output.sentences[1].prompt)
        first, second = (sentence.text.strip() for sentence in output.sentences)
        assert output.text == f"{first}\n\n  {second}"
        with pytest.raises(RequestError, match="target"):
            llm.translate(text)


@cache
def _chat_folder() -> Path:
    from tempfile import mkdtemp

    from tiny_models import make_model

    return make_model("llama-tied", Path(mkdtemp()))


# -- languages -------------------------------------------------------------------------------------------------------

NLLB = Languages([
    "eng_Latn", "fra_Latn", "zho_Hans", "zho_Hant", "yue_Hant", "arb_Arab", "arz_Arab", "pes_Arab", "prs_Arab",
    "por_Latn", "nob_Latn", "nno_Latn", "zsm_Latn", "srp_Cyrl", "ace_Arab", "ace_Latn", "lvs_Latn", "als_Latn",
    "pbt_Arab", "quy_Latn", "swh_Latn", "tgl_Latn", "azj_Latn", "khk_Cyrl", "heb_Hebr", "ydd_Hebr", "kor_Hang",
])  # fmt: skip


@pytest.mark.parametrize(("name", "code"), [
    ("French", "fra_Latn"), ("french", "fra_Latn"), ("fr", "fra_Latn"), ("fra", "fra_Latn"), ("fre", "fra_Latn"),
    ("FRA_LATN", "fra_Latn"), ("fr-CA", "fra_Latn"), ("Chinese", "zho_Hans"), ("zh-TW", "zho_Hant"),
    ("zh_Hant", "zho_Hant"), ("Traditional Chinese", "zho_Hant"), ("Cantonese", "yue_Hant"), ("Arabic", "arb_Arab"),
    ("Egyptian Arabic", "arz_Arab"), ("fa", "pes_Arab"), ("Persian", "pes_Arab"), ("Dari", "prs_Arab"),
    ("Brazilian Portuguese", "por_Latn"), ("pt-BR", "por_Latn"), ("no", "nob_Latn"), ("Norwegian", "nob_Latn"),
    ("nn", "nno_Latn"), ("Malay", "zsm_Latn"), ("Serbian", "srp_Cyrl"), ("ace", "ace_Latn"), ("ace_Arab", "ace_Arab"),
    ("lv", "lvs_Latn"), ("sq", "als_Latn"), ("Pashto", "pbt_Arab"), ("qu", "quy_Latn"), ("Swahili", "swh_Latn"),
    ("Tagalog", "tgl_Latn"), ("Filipino", "tgl_Latn"), ("az", "azj_Latn"), ("Mongolian", "khk_Cyrl"),
    ("iw", "heb_Hebr"), ("Hebrew", "heb_Hebr"), ("Yiddish", "ydd_Hebr"), ("ko", "kor_Hang"), ("Deutsch", ""),
])  # fmt: skip
def test_languages_by_any_name(name: str, code: str) -> None:
    if code:
        assert NLLB.find(name, "target") == code
    else:
        with pytest.raises(RequestError, match="does not know"):
            NLLB.find(name, "target")


@pytest.mark.parametrize(
    ("name", "near"), [("Franch", "French"), ("Portuguesse", "Portuguese"), ("fra_Latinn", "Latin")]
)
def test_an_unknown_language_is_an_error_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(RequestError, match=near) as caught:
        NLLB.find(name, "target")
    assert caught.value.field == "target"
    with pytest.raises(RequestError):
        parse("", "source")
    with pytest.raises(RequestError):
        parse(7, "source")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20))
def test_any_text_is_a_language_or_an_error(name: str) -> None:
    try:
        found = NLLB.find(name, "target")
    except RequestError:
        return
    assert found in NLLB.codes


def test_models_that_must_be_told(engines: Any) -> None:
    with pytest.raises(RequestError, match="target language") as caught:
        engines("nllb").translate("x", source="en")
    assert caught.value.field == "target"
    with pytest.raises(RequestError, match="English to German"):
        engines("marian").translate("x", target="French")
    assert engines("marian").translate("x", source="eng", target="German", max_tokens=2)
    with pytest.raises(RequestError, match="source language"):
        engines("t5").translate("x", target="French")
    for bad in ({"beam_width": 0}, {"max_tokens": 3, "sampling_params": SamplingParams()}, {"max_tokens": 0}):
        with pytest.raises(RequestError):
            engines("marian").translate("x", **bad)
    with pytest.raises(RequestError, match="text 1"):
        engines("marian").translate(["x", 5])  # type: ignore[list-item]


# -- sentences -------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(["Dr. ", "Hello", " ", "  ", "\n", "\r\n", "\u2028", "\x0b", "\t", ". ", "! ", "。", "？", "3.5", "“", "🙂", "\u3000", "\xa0", "مرحبا؟ ", "\x00"])  # fmt: skip # noqa: E501


@settings(max_examples=300, deadline=None)
@given(
    st.lists(WORDS | st.text(max_size=5), max_size=30).map("".join),
    st.sampled_from(["en", "de", "ja", "ar", "hi", "xx"]),
)
def test_no_character_is_lost(text: str, language: str) -> None:
    found = cut(text, language)
    assert "".join(sentence.whole for sentence in found) == text
    for sentence in found:
        assert sentence.text == sentence.text.strip()
        assert not (sentence.before + sentence.after).strip()
        pieces = list(shortened(sentence, lambda piece: len(piece) <= 7)) if sentence.text else [sentence]
        assert "".join(piece.whole for piece in pieces) == sentence.whole
        assert all(len(piece.text) <= 7 for piece in pieces if sentence.text)


def test_sentences() -> None:
    text = "Dr. Smith paid $3.50.  He left! Really?\nNext line"
    found = [sentence.text for sentence in cut(text, "en")]
    assert found == ["Dr. Smith paid $3.50.", "He left!", "Really?", "Next line"]


# -- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [
    {"quantization": "int4"}, {"deterministic": True}, {"kv_cache_dtype": "fp8"}, {"max_model_len": 4000},
    {"block_size": 128},
])  # fmt: skip
def test_settings_that_these_models_do_not_have(made: Any, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(str(made("nllb")[0]), **setting)
    assert caught.value.field in setting


def test_pickled_weights_need_a_flag_and_run_nothing(made: Any, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file

    folder = tmp_path / "model"
    shutil.copytree(made("nllb")[0], folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="allow_pickle"):
        LLM(str(folder))
    told: dict[str, Any] = {"source": "en", "target": "fr", "max_tokens": 8}
    with LLM(str(made("nllb")[0]), dtype="float32") as llm:
        expected = llm.translate("The fox.", **told)[0].text
    for old in (False, True):
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        with LLM(str(folder), dtype="float32", allow_pickle=True) as llm:
            assert llm.translate("The fox.", **told)[0].text == expected
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:5000])
    with pytest.raises(ModelFileError, match="broken"):
        LLM(str(folder), allow_pickle=True)

    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return (Path.touch, (ran,))

    for old in (False, True):
        torch.save({**tensors, "x": Evil()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
        with pytest.raises(ModelFileError, match="more than tensors"):
            LLM(str(folder), allow_pickle=True)
        assert not ran.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert ran.exists()  # the file was dangerous indeed


def test_sharded_pickles(made: Any, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file

    folder = tmp_path / "model"
    shutil.copytree(made("marian")[0], folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for shard, part in shards.items():
        torch.save({name: tensors[name] for name in part}, folder / shard)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {name: shard for shard, part in shards.items() for name in part}}))
    with LLM(str(folder), allow_pickle=True) as llm:
        assert llm.translate("The fox.", max_tokens=2)
    for bad in ("../x.bin", "/etc/x.bin", 5):
        index.write_text(json.dumps({"weight_map": {names[0]: bad}}))
        with pytest.raises(ModelFileError, match="weight_map"):
            LLM(str(folder), allow_pickle=True)
