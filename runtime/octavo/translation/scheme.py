"""How a model is told from which language to which: a `Scheme` for each way. Made by `load_scheme` when an engine
starts, used by its clients."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.errors import ModelFileError, RequestError
from octavo.models.config import read_json
from octavo.models.seq2seq_config import Seq2SeqConfig
from octavo.models.sources import ModelFiles
from octavo.tokenizer import Tokenizer, load_tokenizer
from octavo.translation.languages import Language, Languages, language_name, parse
from octavo.translation.pieces import PieceTokenizer, read_vocabulary, special_tokens

_FLORES = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")
_M2M100 = re.compile(r"__([a-z]{2,3})__")
_MADLAD = re.compile(r"<2([A-Za-z_]+)>")
_MARIAN = re.compile(r">>(.+)<<")


class Scheme(ABC):
    """`source` and `target` are codes of the model, as `languages` gives them, or None where a model needs none."""

    def __init__(self, tokenizer: Tokenizer, config: Seq2SeqConfig) -> None:
        self.tokenizer, self.config = tokenizer, config

    @abstractmethod
    def languages(self, source: object, target: object) -> tuple[str | None, str | None]:
        """The model's codes for what a user typed; None: was not given. Raises `RequestError` for a language that the
        model does not know, and for one that it must be told."""

    @abstractmethod
    def known(self) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
        """Tags of the languages that it translates from, and of those that it translates to, as `languages` takes
        them; None where the model's files do not say."""

    def source_ids(self, text: str, source: str | None = None, target: str | None = None) -> list[int]:
        """What the encoder reads."""
        return self._ended(self.tokenizer.encode(text))

    def prompt_ids(self, target: str | None = None) -> list[int]:
        """What the decoder begins with."""
        forced = self.config.forced_bos_token_id
        return [self.config.decoder_start_token_id, *([] if forced is None else [forced])]

    def _ended(self, ids: list[int]) -> list[int]:
        end = self.config.eos_token_ids[0]
        return ids if ids and ids[-1] == end else [*ids, end]


class LanguageTokens(Scheme):
    """NLLB and M2M100: a token for the language in front of the source, and one that the output begins with."""

    def __init__(
        self, tokenizer: Tokenizer, config: Seq2SeqConfig, tokens: Mapping[str, int], *, default: str | None,
        behind: bool = False,
    ) -> None:  # fmt: skip
        """`default`: the source language where none is given. `behind`: the source's token stands at its end."""
        super().__init__(tokenizer, config)
        self.tokens, self.default, self.behind = tokens, default, behind
        self._languages = Languages(tokens)

    def languages(self, source: object, target: object) -> tuple[str | None, str | None]:
        if target is None:
            raise RequestError(f"this model must be told the target language, one of {len(self.tokens)}", "target")
        found = self.default if source is None else self._languages.find(source, "source")
        if found is None:
            raise RequestError("this model must be told the source language", "source")
        return found, self._languages.find(target, "target")

    def known(self) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
        tags = self._languages.tags()
        return tags, tags

    def source_ids(self, text: str, source: str | None = None, target: str | None = None) -> list[int]:
        ids, end = self.tokenizer.encode(text, add_special_tokens=False), self.config.eos_token_ids[0]
        code = source or self.default
        token = [] if code is None else [self.tokens[code]]
        return [*ids, end, *token] if self.behind else [*token, *ids, end]

    def prompt_ids(self, target: str | None = None) -> list[int]:
        if target is None:
            return super().prompt_ids()
        return [self.config.decoder_start_token_id, self.tokens[target]]


class TargetPrefix(Scheme):
    """MADLAD-400 and the Marian models of several languages: the source begins with the target's name."""

    def __init__(self, tokenizer: Tokenizer, config: Seq2SeqConfig, prefixes: Mapping[str, str]) -> None:
        super().__init__(tokenizer, config)
        self.prefixes = prefixes
        self._languages = Languages(prefixes)

    def languages(self, source: object, target: object) -> tuple[str | None, str | None]:
        if target is None:
            raise RequestError(f"this model must be told the target language, one of {len(self.prefixes)}", "target")
        code = None if source is None else parse(source, "source").code  # only sentences are cut by it
        return code, self._languages.find(target, "target")

    def known(self) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
        return None, self._languages.tags()

    def source_ids(self, text: str, source: str | None = None, target: str | None = None) -> list[int]:
        return super().source_ids(text if target is None else f"{self.prefixes[target]} {text}")


class Pair(Scheme):
    """Marian models from one language to one other. They need not be told, but may be."""

    def __init__(self, tokenizer: Tokenizer, config: Seq2SeqConfig, pair: tuple[str, str]) -> None:
        """`pair`: as the tokenizer's settings name it, or empty."""
        super().__init__(tokenizer, config)
        self.pair = pair

    def languages(self, source: object, target: object) -> tuple[str | None, str | None]:
        for given, own, field in ((source, self.pair[0], "source"), (target, self.pair[1], "target")):
            known = Language.of(own)
            if given is not None and parse(given, field).code != (known.code if known else None) and known:
                names = " to ".join(map(language_name, self.pair))
                raise RequestError(f"this model translates from {names}, and {field} is {given!r}", field)
        return self.pair[0] or None, self.pair[1] or None

    def known(self) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
        source, target = (Languages([own]).tags() if own else None for own in self.pair)
        return source, target


class Instruction(Scheme):
    """T5 and what was trained from it: told in English, as T5 was."""

    def languages(self, source: object, target: object) -> tuple[str | None, str | None]:
        for given, field in ((source, "source"), (target, "target")):
            if given is None:
                raise RequestError(f"this model must be told the {field} language", field)
        return _tag(source, "source"), _tag(target, "target")

    def known(self) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
        return None, None

    def source_ids(self, text: str, source: str | None = None, target: str | None = None) -> list[int]:
        if source is not None and target is not None:
            text = f"translate {language_name(source)} to {language_name(target)}: {text}"
        return super().source_ids(text)


def _tag(name: object, field: str) -> str:
    found = parse(name, field)
    return "-".join(part for part in (found.code, found.script, found.region) if part)


def load_scheme(files: ModelFiles, config: Seq2SeqConfig, *, trust_remote_code: bool) -> Scheme:
    """With the tokenizer of a resolved model. Raises `ModelFileError`."""
    folder = files.path
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    if config.model_type == "marian":
        return _marian(folder, settings, config)
    if config.model_type == "m2m_100" and (folder / "vocab.json").is_file():
        return _m2m100(folder, settings, config)
    tokenizer = load_tokenizer(files, trust_remote_code=trust_remote_code)
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    if config.model_type == "m2m_100":
        tokens = {token: number for token, number in vocabulary.items() if _FLORES.fullmatch(token)}
        default = settings.get("src_lang") or "eng_Latn"
        legacy = settings.get("legacy_behaviour") is True
        return LanguageTokens(tokenizer, config, tokens, default=default if default in tokens else None, behind=legacy)
    prefixes = {match[1]: token for token in vocabulary if (match := _MADLAD.fullmatch(token))}
    return TargetPrefix(tokenizer, config, prefixes) if prefixes else Instruction(tokenizer, config)


def _marian(folder: Path, settings: Mapping[str, Any], config: Seq2SeqConfig) -> Scheme:
    if (folder / "target_vocab.json").is_file():
        raise ModelFileError("different vocabularies of source and target are not implemented", str(folder))
    vocab = read_vocabulary(folder / "vocab.json")
    named = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", **settings}
    tokenizer = PieceTokenizer(folder / "source.spm", vocab, (), named, codes=True)
    prefixes = {match[1]: token for token in vocab if (match := _MARIAN.fullmatch(token))}
    if prefixes:
        return TargetPrefix(tokenizer, config, prefixes)
    source, target = (str(settings.get(f"{side}_lang") or "") for side in ("source", "target"))
    return Pair(tokenizer, config, (source, target))


def _m2m100(folder: Path, settings: Mapping[str, Any], config: Seq2SeqConfig) -> Scheme:
    vocab = read_vocabulary(folder / "vocab.json")
    names = [token for token in special_tokens(folder, settings) if _M2M100.fullmatch(token)]
    names = names or [f"__{code}__" for code in _listed_languages(folder, settings)]
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", **settings}
    tokenizer = PieceTokenizer(folder / "sentencepiece.bpe.model", vocab, names, named, codes=False)
    tokens = {name.strip("_"): len(vocab) + place for place, name in enumerate(names)}
    default = settings.get("src_lang") or "en"
    return LanguageTokens(tokenizer, config, tokens, default=default if default in tokens else None)


def _listed_languages(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """Of a folder that transformers 5 saved: it names a list that transformers has."""
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES

    name = settings.get("language_codes", "m2m100")
    if name not in FAIRSEQ_LANGUAGE_CODES:
        raise ModelFileError("names no list of languages", str(folder / "tokenizer_config.json"), "language_codes")
    return list(FAIRSEQ_LANGUAGE_CODES[name])
