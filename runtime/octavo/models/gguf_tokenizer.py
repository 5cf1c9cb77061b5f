"""The tokenizer that a GGUF header describes. Called by `tokenizer.load_tokenizer`; needs no torch, no transformers.

Built straight from the vocabulary and the merges, in about a fifth of a second for 49 000 tokens. How text is split
before merging follows `tokenizer.ggml.pre`, as llama.cpp and the original tokenizers do. (transformers ignores some of
its values: for "smollm" it drops the rule that digits stand alone, and "x  7" comes out as ids the model never saw.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from octavo.errors import ModelFileError, UnsupportedModelError
from octavo.models.gguf_file import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4

# How the byte-level families split text, as their own tokenizer.json files state it.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_REGEX = {"llama-bpe": _LLAMA3, "qwen2": _QWEN2, "tekken": _TEKKEN}
_ALIASES = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "smaug-bpe": "llama-bpe",
    "deepseek-r1-qwen": "qwen2", "megrez": "qwen2",
    "starcoder": "smollm", "refact": "smollm", "command-r": "smollm", "codeshell": "smollm", "exaone": "smollm",
    "default": "gpt-2", "gpt2": "gpt-2", "phi-2": "gpt-2", "olmo": "gpt-2", "mpt": "gpt-2",
}  # fmt: skip
_WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")  # a split found in the vocabulary is not merged anew; and a BOS by default


def gguf_tokenizer(gguf: GGUFFile) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of `gguf` and its settings under the names of `tokenizer_config.json`.

    Settings: bos_token, eos_token, unk_token, pad_token, chat_template, and eos_token_ids (all tokens that end a turn).
    Raises `ModelFileError` for an unsound vocabulary and `UnsupportedModelError` for a kind not implemented.
    """
    meta, file = gguf.metadata, str(gguf.path)
    kind = meta.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        message = f"{str(kind)[:40]!r} is not implemented; supported: gpt2 (byte-level), llama (sentencepiece)"
        raise UnsupportedModelError(message, file=file, field="tokenizer.ggml.model")
    tokens = gguf.strings("tokenizer.ggml.tokens")
    settings = _settings(meta, tokens, file)
    try:
        backend = _byte_level(gguf, tokens, file) if kind == "gpt2" else _sentencepiece(gguf, tokens)
    except (ModelFileError, MemoryError):
        raise
    except Exception as error:  # the library raises plain Exception for merges outside the vocabulary
        raise ModelFileError(f"makes no tokenizer: {error}", file=file, field="tokenizer.ggml.merges") from error
    _add_special(backend, tokens, meta.get("tokenizer.ggml.token_type"), file)
    pre = _ALIASES.get(str(meta.get("tokenizer.ggml.pre")), meta.get("tokenizer.ggml.pre"))
    bos_by_default = kind == "llama" or pre in _WHOLE_WORDS_FIRST
    bos = settings.get("bos_token") if meta.get("tokenizer.ggml.add_bos_token", bos_by_default) else None
    eos = settings.get("eos_token") if meta.get("tokenizer.ggml.add_eos_token", False) else None
    set_template(backend, bos, eos)
    return backend, settings


def set_template(backend: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make `backend` put `bos` before and `eos` after a text encoded with special tokens; None for neither."""
    from tokenizers import processors

    before, after = ([f"{token}:0"] if token else [] for token in (bos, eos))
    named = [(token, backend.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
    backend.post_processor = processors.TemplateProcessing(
        single=[*before, "$A:0", *after],
        pair=[*before, "$A:0", *after, *(piece[:-1] + "1" for piece in before), "$B:1", *(p[:-1] + "1" for p in after)],
        special_tokens=named,
    )


def _settings(meta: dict[str, Any], tokens: Sequence[str], file: str) -> dict[str, Any]:
    def token_id(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = meta.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(tokens):
            raise ModelFileError(f"is {value}, outside the {len(tokens)} tokens", file=file, field=key)
        return value

    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    settings: dict[str, Any] = {}
    for setting, name in names.items():
        found = token_id(name)
        if found is not None:
            settings[setting] = tokens[found]
    ends = [token_id(name) for name in ("eos", "eot", "eom")]
    settings["eos_token_ids"] = tuple(dict.fromkeys(end for end in ends if end is not None))
    template = meta.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return settings


def _byte_level(gguf: GGUFFile, tokens: list[str], file: str) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    named = gguf.metadata.get("tokenizer.ggml.pre", "default")
    pre = _ALIASES.get(named, named)
    merges = _merges(gguf)
    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=pre in _WHOLE_WORDS_FIRST,
        )
    )
    if pre == "smollm":
        splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    elif pre == "gpt-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre in _REGEX:
        split = pre_tokenizers.Split(Regex(_REGEX[pre]), behavior="isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    else:
        # guessing a split gives ids that the model never saw, and answers that are subtly wrong
        known = ", ".join(sorted({"smollm", "gpt-2", *_REGEX, *_ALIASES}))
        message = f"{str(named)[:40]!r} is not implemented; supported: {known}"
        raise UnsupportedModelError(message, file=file, field="tokenizer.ggml.pre")
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(gguf: GGUFFile, tokens: list[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(tokens)}
    if gguf.has_strings("tokenizer.ggml.merges"):
        merges = _merges(gguf)
    else:
        scores = gguf.metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, list) or len(scores) != len(tokens):
            message = f"must hold one score for each of the {len(tokens)} tokens"
            raise ModelFileError(message, file=str(gguf.path), field="tokenizer.ggml.scores")
        merges = _merges_from_scores(vocab, scores)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    spaced = bool(gguf.metadata.get("tokenizer.ggml.add_space_prefix", True))
    scheme = "first" if spaced else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spaced:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges(gguf: GGUFFile) -> list[tuple[str, str]]:
    key, found = "tokenizer.ggml.merges", []
    for merge in gguf.strings(key):
        left, space, right = merge.partition(" ")
        if not space:
            raise ModelFileError("must be pairs with a space between", file=str(gguf.path), field=key)
        found.append((left, right))
    return found


def _merges_from_scores(vocab: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that a sentencepiece vocabulary implies: every split of a token into two tokens, best score first."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, index in vocab.items():
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found.extend((scores[index], len(left), len(right), left, right) for left, right in pairs)
    found.sort(key=lambda item: item[:3], reverse=True)
    return [(left, right) for *_, left, right in found]


def _add_special(backend: Tokenizer, tokens: Sequence[str], types: Any, file: str) -> None:
    from tokenizers import AddedToken

    if types is None:
        return
    if not isinstance(types, list) or len(types) != len(tokens):
        message = f"must hold one type for each of the {len(tokens)} tokens"
        raise ModelFileError(message, file=file, field="tokenizer.ggml.token_type")
    for special, wanted in ((True, _CONTROL), (False, _USER_DEFINED)):
        chosen = [token for token, kind in zip(tokens, types, strict=True) if kind == wanted and token]
        added = [AddedToken(token, normalized=False, special=special) for token in chosen]
        if special:
            backend.add_special_tokens(added)
        else:
            backend.add_tokens(added)
