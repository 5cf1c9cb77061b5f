"""Tiny translation models with tokenizers of the kinds that are published, trained here: written by transformers' own
classes, so that the files are laid out as theirs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tiny_models import TEXT
from tiny_seq2seq import make_seq2seq
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

LINES = [
    *TEXT,
    "Der schnelle braune Fuchs springt über den faulen Hund. Wie geht es dir? Mir geht es gut.",
    "Le renard brun saute par-dessus le chien paresseux. Où est la gare ? Je ne sais pas !",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "これは文です。もう一つの文です。",
]
PIECES = 240
CONTROLS = ["<s>", "<pad>", "</s>", "<unk>"]
M2M_LANGUAGES = ["__de__", "__en__", "__fr__", "__ja__", "__zh__"]


def train_pieces(path: Path, kind: str, pieces: int = PIECES, **options: Any) -> list[str]:
    """A sentencepiece model of `LINES`; returns its pieces without <unk>, <s> and </s>."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=pieces, model_type=kind, minloglevel=2,
        character_coverage=1.0, **options,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    read = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [read.id_to_piece(n) for n in range(len(read)) if not read.is_control(n) and not read.is_unknown(n)]


def nllb(folder: Path, **changes: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of transformers; the files lie in `folder`. So do the others."""
    from transformers import NllbTokenizer

    trained = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    trained.train_from_iterator(LINES, BpeTrainer(vocab_size=PIECES, special_tokens=CONTROLS, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    tokenizer = NllbTokenizer(vocab=state["vocab"], merges=[tuple(merge) for merge in state["merges"]])
    tokenizer.save_pretrained(folder)
    return make_seq2seq("m2m100", folder, vocab_size=len(tokenizer), **changes), tokenizer


def m2m100(folder: Path, **changes: Any) -> tuple[Any, Any]:
    from transformers import M2M100Tokenizer

    pieces = train_pieces(folder / "spm.model", "bpe")
    vocab = {piece: number for number, piece in enumerate([*CONTROLS, *pieces])}
    (folder / "v.json").write_text(json.dumps(vocab))
    tokenizer = M2M100Tokenizer(str(folder / "v.json"), str(folder / "spm.model"), src_lang="en")
    tokenizer.save_pretrained(folder)
    return make_seq2seq("m2m100", folder, vocab_size=len(vocab) + 108, **changes), tokenizer


def marian(folder: Path, targets: tuple[str, ...] = (), **more: Any) -> tuple[Any, Any]:
    """`targets`: of a model of several, as ">>fra<<"."""
    from transformers import MarianTokenizer

    for side in ("source", "target"):
        pieces = train_pieces(folder / f"{side}.spm", "unigram", 155)
    vocab = {piece: number for number, piece in enumerate(["</s>", "<unk>", *pieces, *targets, "<pad>"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = MarianTokenizer(
        str(folder / "source.spm"), str(folder / "target.spm"), str(folder / "vocab.json"),
        source_lang="eng", target_lang="deu",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    pad = vocab["<pad>"]
    changes = {"pad_token_id": pad, "decoder_start_token_id": pad, "bad_words_ids": [[pad]]}
    return make_seq2seq("marian", folder, vocab_size=len(vocab), **changes, **more), tokenizer


def t5(folder: Path, targets: tuple[str, ...] = (), name: str = "t5") -> tuple[Any, Any]:
    """`targets`: of MADLAD-400, as "<2fr>"."""
    from transformers import AutoTokenizer

    train_pieces(
        folder / "spiece.model", "unigram", 155, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        user_defined_symbols=list(targets),
    )  # fmt: skip
    settings = {
        "tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "unk_token": "<unk>",
        "pad_token": "<pad>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return make_seq2seq(name, folder, vocab_size=len(tokenizer)), tokenizer
