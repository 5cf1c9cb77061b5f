"""`decode.detokenize`: the pieces join to the whole, and no U+FFFD comes before its time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from files_fixtures import SENTENCES, byte_level_backend, many_texts, sentencepiece_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.decode.detokenize import Detokenizer
from octavo.models.config import load_config  # noqa: F401 - the module graph as the engine imports it
from octavo.tokenizer import Tokenizer

TEXTS = [text for text in many_texts(400, seed=3) if text]


def byte_level() -> Tokenizer:
    names = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
    return Tokenizer(byte_level_backend(), names, "trained")


def sentencepiece() -> Tokenizer:
    """Byte fallback, and a leading space that decoding takes away: as the tokenizers of Llama 2 and Mistral."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    tokens, _, _ = sentencepiece_tokens()
    vocab = {token: index for index, token in enumerate(tokens)}
    known = set(vocab)
    merges = [(t[:i], t[i:]) for t in tokens[259:] for i in range(1, len(t)) if t[:i] in known and t[i:] in known]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<s>", "</s>")])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, "trained")


def wordpiece() -> Tokenizer:
    """A decoder of neither kind: the generic path."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    return Tokenizer(backend, {"eos_token": "[SEP]", "unk_token": "[UNK]"}, "trained")


KINDS = {"byte_level": byte_level, "sentencepiece": sentencepiece, "wordpiece": wordpiece}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: Any) -> Tokenizer:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    return byte_level()


@pytest.fixture(scope="module")
def spiece_tokenizer() -> Tokenizer:
    return sentencepiece()


def stream(tokenizer: Tokenizer, ids: list[int], sizes: list[int] | None = None, **options: Any) -> list[str]:
    """All pieces, pushing as many ids at a time as `sizes` says."""
    detokenizer, pieces, at = Detokenizer(tokenizer, **options), [], 0
    for size in sizes or [1] * len(ids):
        pieces.append(detokenizer.push(ids[at : at + size]))
        at += size
    pieces.append(detokenizer.push(ids[at:]))
    return [*pieces, detokenizer.flush()]


def test_texts_of_many_scripts(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for skip in (True, False):
            pieces = stream(tokenizer, ids, skip_special_tokens=skip)
            assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip), text
            if "\ufffd" not in text:
                assert not any("\ufffd" in piece for piece in pieces), text


def test_several_ids_at_a_time(tokenizer: Tokenizer) -> None:
    for index, text in enumerate(TEXTS):
        ids = tokenizer.encode(text)
        sizes = [1 + (index + step) % 5 for step in range(len(ids))]
        assert "".join(stream(tokenizer, ids, sizes)) == tokenizer.decode(ids), text


def test_text_comes_as_soon_as_it_is_certain(byte_tokenizer: Tokenizer, spiece_tokenizer: Tokenizer) -> None:
    """Nothing is held back but an unfinished character: what was shown after each token is all that is decided."""
    for tokenizer in (byte_tokenizer, spiece_tokenizer):
        for text in ("hello world", "👩‍👩‍👧 é 日本", "Привет"):
            ids, shown = tokenizer.encode(text, add_special_tokens=False), ""
            detokenizer = Detokenizer(tokenizer)
            for count, token in enumerate(ids, 1):
                shown += detokenizer.push([token])
                whole = b"".join(tokenizer.token_bytes(i) for i in ids[:count]).decode("utf-8", "ignore")
                assert shown == (whole if tokenizer.is_byte_level else whole.removeprefix(" "))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 620), max_size=60), st.booleans(), st.lists(st.integers(1, 7), max_size=20))
def test_random_ids_join_exactly(byte_tokenizer: Tokenizer, ids: list[int], skip: bool, sizes: list[int]) -> None:
    """Byte-level: any ids, broken UTF-8, special and unknown ones too, in any grouping."""
    joined = "".join(stream(byte_tokenizer, ids, sizes, skip_special_tokens=skip))
    assert joined == byte_tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 520), max_size=60), st.booleans())
def test_random_ids_byte_fallback(spiece_tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    """Byte fallback: exact wherever the ids are valid text; else still all of it, and never a failure."""
    joined = "".join(stream(spiece_tokenizer, ids, skip_special_tokens=skip))
    whole = spiece_tokenizer.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in whole:
        assert joined == whole
    else:
        assert joined.replace("\ufffd", "") or not whole.replace("\ufffd", "")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_after_any_prompt(spiece_tokenizer: Tokenizer, prompt: str, text: str) -> None:
    """With a prompt before it, the text is what the prompt's own decoding lacks: its leading space is kept."""
    prompt_ids = spiece_tokenizer.encode("the " + prompt, add_special_tokens=False)
    ids = spiece_tokenizer.encode("the" + text, add_special_tokens=False)
    whole = spiece_tokenizer.decode(prompt_ids + ids)
    before = spiece_tokenizer.decode(prompt_ids)
    if "\ufffd" not in whole and whole.startswith(before):
        assert "".join(stream(spiece_tokenizer, ids, prompt_ids=prompt_ids)) == whole[len(before) :]


def test_leading_space_depends_on_the_prompt(spiece_tokenizer: Tokenizer) -> None:
    ids = spiece_tokenizer.encode("the capital", add_special_tokens=False)
    assert "".join(stream(spiece_tokenizer, ids)) == "the capital"
    prompt_ids = spiece_tokenizer.encode("is it")
    assert "".join(stream(spiece_tokenizer, ids, prompt_ids=prompt_ids)) == " the capital"
    assert "".join(stream(spiece_tokenizer, ids, prompt_ids=[1])) == "the capital"  # BOS is no text before it


def test_prompt_that_ends_inside_a_character(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("日")
    assert len(ids) > 1
    assert "".join(stream(byte_tokenizer, ids[1:], prompt_ids=ids[:1])) == "日"


def test_unfinished_character_at_the_end(byte_tokenizer: Tokenizer, spiece_tokenizer: Tokenizer) -> None:
    for tokenizer in (byte_tokenizer, spiece_tokenizer):
        ids = tokenizer.encode("the👩", add_special_tokens=False)[:-1]
        pieces = stream(tokenizer, ids)
        assert "".join(pieces[:-1]) == "the"
        assert set(pieces[-1]) == {"\ufffd"}
        assert "".join(pieces) == tokenizer.decode(ids)


def test_a_stream_of_broken_bytes_is_not_held_for_ever(spiece_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(spiece_tokenizer)
    shown = "".join(detokenizer.push([3 + 0xFF]) for _ in range(100))
    assert len(shown) > 90


def test_each_token_costs_the_same(tokenizer: Tokenizer) -> None:
    """Four times the tokens must take about four times as long, not sixteen."""
    ids = [token for text in TEXTS for token in tokenizer.encode(text)]
    ids = (ids * (20_000 // len(ids) + 1))[:20_000]

    def seconds(count: int) -> float:
        best = float("inf")
        for _ in range(3):
            detokenizer, start = Detokenizer(tokenizer), time.perf_counter()
            for token in ids[:count]:
                detokenizer.push([token])
            best = min(best, time.perf_counter() - start)
        return best

    seconds(1000)
    assert seconds(20_000) < 8 * seconds(5_000)


def test_default_import_is_light(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import octavo.decode.detokenize, sys; assert 'torch' not in sys.modules and 'tokenizers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
