"""The tokenizers of M2M100 and Marian: sentencepiece cuts a text into pieces, a `vocab.json` numbers them.

Encoding is done by the sentencepiece library, because the pieces must be the model's own to the last; a tokenizer of
the `tokenizers` library with the same numbers stands behind everything else, so that streams, stop strings and grammars
work as for other models. Called by the schemes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import ConfigError, ModelFileError, RequestError
from octavo.models.config import read_json
from octavo.tokenizer import Tokenizer, token_text

if TYPE_CHECKING:
    import sentencepiece

_SPACE = "▁"


class PieceTokenizer(Tokenizer):
    """`special`: tokens after those of `vocab`, in order. `codes`: whether a text may begin with one of the
    vocabulary's ">>language<<"."""

    def __init__(
        self, model: Path, vocab: Mapping[str, int], special: Sequence[str], settings: Mapping[str, Any], *, codes: bool
    ) -> None:
        from tokenizers import AddedToken, decoders
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import WordLevel

        unknown = token_text(settings.get("unk_token") or "<unk>")
        if unknown not in vocab:
            raise ModelFileError(f"has no token {unknown!r}", str(model.parent / "vocab.json"))
        backend = Backend(WordLevel(dict(vocab), unk_token=unknown))
        backend.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
        controls = [name for name in ("<s>", "</s>", "<unk>", "<pad>", *special) if name in vocab or name in special]
        controls += [name for name in vocab if codes and name.startswith(">>") and name.endswith("<<")]
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in controls])
        super().__init__(backend, settings, str(model))
        self._vocab, self._unknown, self._codes, self._model = vocab, vocab[unknown], codes, _load(model)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        if not isinstance(text, str):
            raise RequestError(f"the prompt is a {type(text).__name__}, not text", "prompt")
        ids: list[int] = []
        end = text.find("<<") + 2
        if self._codes and text.startswith(">>") and end > 2 and text[:end] in self._vocab:
            ids, text = [self._vocab[text[:end]]], text[end:]
        try:
            pieces = self._model.encode(text, out_type=str)
        except (TypeError, UnicodeError, RuntimeError) as error:
            raise RequestError("the prompt has surrogates, which are no text", "prompt") from error
        ids += [self._vocab.get(piece, self._unknown) for piece in pieces]
        return ids + list(self.eos_token_ids[:1]) if add_special_tokens else ids


def read_vocabulary(path: Path) -> dict[str, int]:
    """`vocab.json`. Raises `ModelFileError` unless it numbers its tokens from 0 on."""
    vocab = read_json(path)
    if not all(type(number) is int for number in vocab.values()):
        raise ModelFileError("must be an object from tokens to numbers", str(path))
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ModelFileError("must number its tokens from 0 on, without gaps", str(path))
    return vocab


def special_tokens(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """Tokens that a tokenizer has besides its vocabulary, by its own files."""
    more: Any = settings.get("additional_special_tokens") or settings.get("extra_special_tokens")
    path = folder / "special_tokens_map.json"
    if not more and path.is_file():
        more = read_json(path).get("additional_special_tokens")
    return [token_text(token) for token in (more if isinstance(more, list) else ())]


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        import sentencepiece
    except ImportError as error:
        raise ConfigError("this model's tokenizer needs sentencepiece: pip install sentencepiece", "model") from error
    if not path.is_file():
        raise ModelFileError("is missing", str(path))
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except Exception as error:  # the library has no narrower class
        raise ModelFileError(f"is not a sound sentencepiece model: {str(error)[:200]}", str(path)) from error
