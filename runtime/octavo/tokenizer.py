"""Text to token ids and back. `load_tokenizer` is called by the engine's front and by the CLI.

The usual files (`tokenizer.json`, or a GGUF header) are read with the `tokenizers` library alone, because importing
transformers takes longer than everything else here; its AutoTokenizer serves the other formats. Code that lies in a
model folder runs only if the caller passed `trust_remote_code=True`.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.errors import ModelFileError, RequestError, UnsupportedModelError
from octavo.models.config import read_json
from octavo.models.sources import ModelFiles

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    from octavo.models.encoder_config import EncoderConfig
    from octavo.models.seq2seq_config import DecoderConfig

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FILES = ("vocab", "merges", "init_inputs", "gguf_file", "tokenizer_object")
_TEMPLATE_BYTES = 4 << 20
_LONG = 4096
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_FALLBACK_STEPS: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP_STEPS: list[dict[str, Any]] = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]


def load_tokenizer(files: ModelFiles, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of a resolved model.

    Args:
        trust_remote_code: run tokenizer code from the model's folder, should it have any. Nothing in the folder can
            switch this on.

    Raises:
        ModelFileError: a file is missing or unsound.
        UnsupportedModelError: a kind of tokenizer that is not implemented.
    """
    if files.format == "gguf":
        from octavo.models.gguf_file import GGUFFile
        from octavo.models.gguf_tokenizer import gguf_tokenizer

        with GGUFFile(files.path) as gguf:
            backend, settings = gguf_tokenizer(gguf)
        return Tokenizer(backend, settings, str(files.path))
    folder = files.path
    config_path, tokenizer_path = folder / "tokenizer_config.json", folder / "tokenizer.json"
    settings = read_json(config_path) if config_path.is_file() else {}
    own_code = isinstance(settings.get("auto_map"), dict)
    if tokenizer_path.is_file() and not (own_code and trust_remote_code):
        return _from_tokenizer_json(folder, tokenizer_path, settings)
    _check_names_no_files(settings, str(config_path))
    return _from_transformers(folder, trust_remote_code)


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads: nothing in it changes after loading."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any], place: str) -> None:
        self.backend = backend
        self.place = place
        """The file that it came from, for messages."""
        backend.no_truncation()  # a limit baked into tokenizer.json would cut prompts without a word
        backend.no_padding()
        self._named = {name: token_text(settings.get(name)) for name in _NAMED if settings.get(name) is not None}
        self._templates = _templates(settings.get("chat_template"), place)
        ids = {name: backend.token_to_id(text) for name, text in self._named.items()}
        self.bos_token_id: int | None = ids.get("bos_token")
        self.pad_token_id: int | None = ids.get("pad_token")
        eos = settings.get("eos_token_ids")
        found = [ids.get("eos_token")] if eos is None else eos
        self.eos_token_ids: tuple[int, ...] = tuple(end for end in found if end is not None)
        """Tokens that end a text, by the tokenizer's own account; the model's configuration may name more."""
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(index for index, token in added.items() if token.special)
        """Control tokens: left out of decoded text unless asked for."""
        steps = _decoder_steps(backend)
        self.is_byte_level: bool = [step["type"] for step in steps] == ["ByteLevel"]
        """Decoding is joining the bytes of the tokens."""
        self.is_byte_fallback: bool = steps[:3] == _FALLBACK_STEPS and steps[3:] in ([], _STRIP_STEPS)
        """Decoding is joining the pieces that `fallback_piece` gives: the form of sentencepiece models."""
        self.strips_first_space: bool = self.is_byte_fallback and bool(steps[3:])
        self._bytes: dict[int, bytes] = {}
        self._pieces: dict[int, str | int] = {}
        self._hf: PreTrainedTokenizerFast | None = None
        self._lock = threading.Lock()

    # -- text and ids ------------------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. A chat template writes its own special tokens: encode what it renders without them."""
        try:
            return list(encoded(self.backend, text, add_special_tokens).ids)
        except (TypeError, UnicodeError) as error:
            reason = (
                "has surrogates, which are no text"
                if isinstance(text, str)
                else f"is a {type(text).__name__}, not text"
            )
            raise RequestError(f"the prompt {reason}", field="prompt") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids outside the vocabulary have no text; broken UTF-8 gives U+FFFD."""
        try:
            text: str = self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise RequestError(
                f"token ids must be whole numbers, not negative: {error}", field="prompt_token_ids"
            ) from error
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, empty for an unknown id. Joined, they are the UTF-8 of the text."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def fallback_piece(self, token_id: int) -> str | int:
        """What one token of a byte-fallback tokenizer adds to a text: a string, or the value of a single byte."""
        known = self._pieces.get(token_id)
        if known is None:
            token = self.backend.id_to_token(token_id) or ""
            byte = _BYTE_TOKEN.fullmatch(token)
            known = self._pieces[token_id] = int(byte[1], 16) if byte else token.replace("▁", " ")
        return known

    def token_text(self, token_id: int) -> str:
        """One token as text for display, its leading space kept; a part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _find_bytes(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:
            return b""
        if self.is_byte_level:
            table = _byte_of_character()
            try:
                return bytes(table[character] for character in token)
            except KeyError:  # an added token outside the byte alphabet stands for itself
                return token.encode("utf-8", "replace")
        if token_id in self.backend.get_added_tokens_decoder():
            return token.encode("utf-8", "replace")
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte:
            return bytes((int(byte[1], 16),))
        return token.replace("▁", " ").encode("utf-8", "replace")

    # -- chat --------------------------------------------------------------------------------------------------------

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    @property
    def chat_template(self) -> str | None:
        """The default template's source, or None."""
        return self._templates.get("default") or next(iter(self._templates.values()), None)

    def template_source(self, chat_template: str | None = None, *, tools: bool = False) -> str:
        """The template for a chat, with `tools` or without: `chat_template` is a source, or the name of one of the
        model's own. Raises `RequestError` when there is none."""
        source = self._templates.get(chat_template, chat_template) if chat_template is not None else None
        if source is None:
            source = (self._templates.get("tool_use") if tools else None) or self.chat_template
        if source is None:
            message = "this model has no chat template: pass chat_template, or use generate() with a plain prompt"
            raise RequestError(message, field="chat_template")
        return source

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt for a chat. Encode it with `add_special_tokens=False`: the template has written them.

        Args:
            chat_template: Jinja source to use instead of the model's own, or the name of one of its templates.
            kwargs: further variables for the template, such as `enable_thinking`.

        See `chat_template.render_chat` for the rest. Raises `RequestError`, also when the model has no template.
        """
        from octavo.chat_template import render_chat

        source = self.template_source(chat_template, tools=bool(tools))
        return render_chat(
            source,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self._named, **kwargs},
        )

    # -- the model and other libraries -------------------------------------------------------------------------------

    def check_against(self, config: DecoderConfig | EncoderConfig) -> None:
        """Raise `ModelFileError` when a token has no row in the model's embedding of `config.vocab_size` rows."""
        largest = max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= config.vocab_size:
            message = f"the tokenizer has a token {largest}, but the model's vocabulary ends at {config.vocab_size}"
            raise ModelFileError(message, file=self.place, field="vocab_size")

    @property
    def hf(self) -> PreTrainedTokenizerFast:
        """The same tokenizer as transformers' class, built at the first use (this imports transformers)."""
        with self._lock:
            if self._hf is None:
                import tokenizers
                from transformers import PreTrainedTokenizerFast

                templates = self._templates if len(self._templates) > 1 else self.chat_template
                self._hf = PreTrainedTokenizerFast(
                    # a copy: transformers sets padding and truncation on its own
                    tokenizer_object=tokenizers.Tokenizer.from_str(self.backend.to_str()),
                    chat_template=templates,
                    clean_up_tokenization_spaces=False,
                    **self._named,
                )
            return self._hf

    @cached_property
    def named_special_tokens(self) -> dict[str, str]:
        """The special tokens that have a role, such as {"eos_token": "<|im_end|>"}."""
        return dict(self._named)


def encoded(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
    """What the library makes of a text. Other threads go on while it works on a long one: its `encode` holds the
    interpreter (2 s for 660,000 characters, by hand), its `encode_batch` does not."""
    if len(text) <= _LONG:
        return backend.encode(text, add_special_tokens=add_special_tokens)
    return backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]


# -- reading files ---------------------------------------------------------------------------------------------------


def _from_tokenizer_json(folder: Path, path: Path, settings: dict[str, Any]) -> Tokenizer:
    """`tokenizer.json` decides how text is cut and what is put around it; the configuration adds names and tokens.

    Its `add_bos_token` is not read, as in transformers 5: the post-processor of `tokenizer.json` says it already.
    """
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no narrower class
        raise ModelFileError(f"is not a sound tokenizer: {str(error)[:300]}", file=str(path)) from error
    map_path = folder / "special_tokens_map.json"
    if map_path.is_file():
        settings = {**{k: v for k, v in read_json(map_path).items() if k in _NAMED}, **settings}
    _add_tokens(backend, settings, str(folder / "tokenizer_config.json"))
    template = _template_files(folder)
    if template is not None:
        settings = {**settings, "chat_template": template}
    return Tokenizer(backend, settings, str(path))


def _add_tokens(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], file: str) -> None:
    """Tokens which `tokenizer_config.json` has and `tokenizer.json` lacks, in the order of their ids."""
    from tokenizers import AddedToken

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ModelFileError("must be an object from ids to tokens", file=file, field="added_tokens_decoder")
    try:
        for _, value in sorted(decoder.items(), key=lambda item: int(item[0])):
            if value["content"] not in known:
                flags = {k: bool(value.get(k, False)) for k in ("single_word", "lstrip", "rstrip", "special")}
                token = AddedToken(value["content"], normalized=bool(value.get("normalized", True)), **flags)
                backend.add_tokens([token])
                known.add(value["content"])
        extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
        extra = list(extra.values()) if isinstance(extra, dict) else extra
        named = [settings[name] for name in _NAMED if settings.get(name) is not None]
        for text in dict.fromkeys(token_text(value) for value in (*named, *extra)):
            if text not in known:
                backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelFileError(f"has an unsound token: {error!r}", file=file, field="added_tokens_decoder") from error


def _template_files(folder: Path) -> str | dict[str, str] | None:
    """`chat_template.jinja` and its siblings, or a `chat_template.json`; they win over tokenizer_config.json."""
    found: dict[str, str] = {}
    main = folder / "chat_template.jinja"
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for path in (main, *more):
        if path.is_file():
            if path.stat().st_size > _TEMPLATE_BYTES:
                raise ModelFileError(f"is larger than {_TEMPLATE_BYTES} bytes", file=str(path))
            found["default" if path == main else path.stem] = path.read_text(encoding="utf-8", errors="replace")
    if not found and (folder / "chat_template.json").is_file():
        text = read_json(folder / "chat_template.json").get("chat_template")
        return text if isinstance(text, str) else None
    return found or None


def _templates(value: Any, place: str) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    if isinstance(value, dict) and all(isinstance(text, str) for pair in value.items() for text in pair):
        return dict(value)
    raise ModelFileError("must be a string, or named strings", file=place, field="chat_template")


def token_text(value: Any) -> str:
    """A special token is a string, or an object with "content"."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ModelFileError(f"a special token must be a string, not {json.dumps(value, default=repr)[:80]}")
    return text


def _from_transformers(folder: Path, trust_remote_code: bool) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # any of many, from a missing file to a parser's own
        raise ModelFileError(f"holds no tokenizer that can be read: {str(error)[:500]}", file=str(folder)) from error
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError("has a tokenizer without a fast (Rust) form", file=str(folder), field="tokenizer")
    settings = {name: str(getattr(hf, name)) for name in _NAMED if getattr(hf, name, None) is not None}
    tokenizer = Tokenizer(backend, {**settings, "chat_template": hf.chat_template}, str(folder))
    tokenizer._hf = hf
    return tokenizer


def _check_names_no_files(settings: Mapping[str, Any], file: str) -> None:
    """transformers would take these for names of files, anywhere on this machine, and make a vocabulary of them."""
    for name in _FILES:
        if settings.get(name):
            raise ModelFileError("names a file to read, which a model must not", file=file, field=name)


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder of `backend` as a flat list of its steps."""
    if backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    return list(decoder["decoders"]) if decoder.get("type") == "Sequence" else [decoder]


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, the other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table
