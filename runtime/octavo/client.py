"""What `LLM` and `AsyncLLM` have in common: prompts and parameters become checked requests for a shared engine."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, cast

from octavo.config import EngineConfig, engine_config_from
from octavo.decode.assemble import Assembler
from octavo.engine.contract import Compiler, EngineStats
from octavo.engine.registry import Placement, acquire, release
from octavo.engine.request import Request, Sink
from octavo.engine.start import IN_PROCESS, Engine
from octavo.errors import EngineClosedError, RequestError
from octavo.host_memory import give_back_memory, memory_goes_back
from octavo.models.sources import DEFAULT_MODEL, Progress
from octavo.sampling_params import SamplingParams
from octavo.tokenizer import Tokenizer
from octavo.translation.scheme import Scheme

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or {"prompt": text} / {"prompt_token_ids": ids}, with an optional "cache_salt". Of a prompt given
both ways the ids run. For an encoder-decoder the prompt is what its encoder reads; "source" and "target" are languages,
and "decoder_prompt_token_ids" says what its output begins with, instead of what follows from the target."""
Message = Mapping[str, Any]

_numbers = itertools.count(1)


class Client:
    """A user of an engine. Keyword arguments are the fields of `EngineConfig`."""

    def __init__(self, model: str = DEFAULT_MODEL, *, progress: Progress | None = None, **settings: Any) -> None:
        self._engine: Engine | None = None  # so that close() works when the next line raises
        self._join(engine_config_from(model, settings), progress)

    @classmethod
    def of(cls, config: EngineConfig, placement: Placement = IN_PROCESS) -> Self:
        """A client of the engine of `config`, in this process or where `placement` says."""
        new = cls.__new__(cls)
        new._engine = None
        new._join(config, None, placement)
        return new

    def _join(self, config: EngineConfig, progress: Progress | None, placement: Placement = IN_PROCESS) -> None:
        self._engine = acquire(config, progress, placement)
        self._compiler: Compiler | None = None
        self._made = itertools.count()

    @property
    def engine(self) -> Engine:
        """The shared engine. Raises `EngineClosedError` after `close()`."""
        if self._engine is None:
            raise EngineClosedError("this LLM was closed: make a new one")
        return self._engine

    @property
    def grammars(self) -> Compiler:
        """Compiles what this client's requests are constrained by."""
        return self._compiler or self.engine.grammars

    def compile_by(self, compiler: Compiler) -> None:
        """Let another than the engine's do it: for this client alone, as others share the engine."""
        self._compiler = compiler

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    def get_tokenizer(self) -> Any:
        """The tokenizer as transformers' `PreTrainedTokenizerFast`."""
        return self.engine.tokenizer.hf

    def stats(self) -> EngineStats:
        """Running and waiting sequences, blocks used, cached and free."""
        return self.engine.service.stats()

    def close(self) -> None:
        """Let go of the engine; the last user's `close` ends its requests and gives back its memory. Safe to call
        twice."""
        engine, self._engine = self._engine, None
        if engine is not None and release(engine):
            with memory_goes_back():
                del engine
            give_back_memory()

    def __del__(self, _at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        # when the interpreter ends the engine has been closed already (`registry`), and the names here are gone
        if getattr(self, "_engine", None) is not None and not _at_exit():
            self.close()

    # ---------------------------------------------------------------- making requests

    def make_request(
        self, prompt: Prompt, params: SamplingParams | None, sink: Sink, *, priority: int = 0, special: bool = True,
        constrain: bool = True,
    ) -> Assembler:  # fmt: skip
        """Check everything and build the request; nothing is submitted yet. `special`: add BOS as the tokenizer
        does. `constrain`: compile its grammar, which may take time; else the caller does."""
        engine = self.engine
        engine.check_generates()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"sampling_params must be SamplingParams, not {type(params).__name__}", "sampling_params"
            )
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise RequestError(f"priority must be an integer, not {priority!r}", "priority")
        text, ids, salt = self._prompt(prompt, special)
        source_ids, forced = None, 0
        if engine.scheme is not None:
            source_ids, (ids, forced) = ids, self._decoder_prompt(engine.scheme, prompt)
        number = next(self._made)
        request = Request(
            f"octavo-{next(_numbers)}", ids, params, sink,
            max_tokens=self._max_tokens(len(ids), params, source_ids),
            eos_token_ids=[*engine.model_config.eos_token_ids, *engine.tokenizer.eos_token_ids],
            bad_word_ids=[*self._bad_words(params), *engine.model_config.bad_word_ids],
            seed=params.seed if params.seed is not None else random.Random((engine.config.seed << 32) +
            number).getrandbits(62), priority=priority, cache_salt=salt, source_ids=source_ids,
            length_offset=forced,
        )  # fmt: skip
        if constrain and params.structured_outputs is not None:
            request.constrain(self.grammars.compile(params.structured_outputs).start)
        return Assembler(request, text, engine.tokenizer, engine.service.abort)

    def _prompt(self, prompt: Prompt, special: bool) -> tuple[str | None, list[int], str]:
        salt, given = "", prompt
        text: str | None = None
        if isinstance(prompt, Mapping):
            salt = prompt.get("cache_salt") or ""
            if not isinstance(salt, str):
                raise RequestError("cache_salt must be a string", "cache_salt")
            if "prompt_token_ids" in prompt:
                text = prompt.get("prompt") if isinstance(prompt.get("prompt"), str) else None
                prompt = prompt["prompt_token_ids"]
                if isinstance(prompt, str):
                    raise RequestError("prompt_token_ids must be token ids, not text", "prompt_token_ids")
            elif "prompt" in prompt:
                prompt = prompt["prompt"]
            else:
                raise RequestError('a prompt given as a dict needs "prompt" or "prompt_token_ids"', "prompt")
        scheme = self.engine.scheme
        if isinstance(prompt, str) and scheme is not None:
            ids, text = scheme.source_ids(prompt, *_languages(scheme, given)), prompt
        elif isinstance(prompt, str):
            ids, text = self.tokenizer.encode(prompt, add_special_tokens=special), prompt
        elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
            ids = self._checked_ids(cast(Sequence[int], prompt), "prompt_token_ids")
        else:
            raise RequestError(f"a prompt must be text or token ids, not {type(prompt).__name__}", "prompt")
        if not ids:
            raise RequestError("the prompt is empty: it has no token", "prompt")
        return text, ids, salt

    def _checked_ids(self, given: Sequence[int], field: str) -> list[int]:
        ids = cast(list[int], list(given))
        vocabulary = self.engine.limits.vocab_size
        sound = set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocabulary
        for token in () if sound else ids:  # one by one, 8000 take a millisecond
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
                raise RequestError(f"token ids must be integers from 0 to {vocabulary - 1}, not {token!r}", field)
        return ids

    def _decoder_prompt(self, scheme: Scheme, prompt: Prompt) -> tuple[list[int], int]:
        """What the decoder begins with, and how many of these tokens count as made: those that the model is forced to
        begin with, but not those of a caller."""
        given = prompt.get("decoder_prompt_token_ids") if isinstance(prompt, Mapping) else None
        if given is None:
            ids = scheme.prompt_ids(_languages(scheme, prompt)[1])
            return ids, len(ids) - 1
        name = "decoder_prompt_token_ids"
        if not isinstance(given, Sequence) or isinstance(given, str | bytes) or not given:
            raise RequestError(f"{name} must be token ids, one at least", name)
        return self._checked_ids(given, name), 0

    def _max_tokens(self, prompt_tokens: int, params: SamplingParams, source: Sequence[int] | None = None) -> int:
        limits = self.engine.limits
        room = limits.max_model_len - prompt_tokens
        if source is not None:
            if len(source) > limits.max_model_len:
                raise RequestError(
                    f"the source has {len(source)} tokens, and the model reads {limits.max_model_len} at most: shorten "
                    "it, or use translate(), which cuts texts into sentences", "prompt",
                )  # fmt: skip
            taken = -(-len(source) // limits.block_size)
            room = min(room, (limits.num_blocks - 1 - taken) * limits.block_size - prompt_tokens)
            if room < 1:
                raise RequestError(
                    f"the source has {len(source)} tokens, which leaves no room in the KV cache: shorten it, or start "
                    "with more num_blocks", "prompt",
                )  # fmt: skip
        if room < 1:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens, but this engine holds {limits.max_model_len} with the output: "
                "shorten it, or start with a larger max_model_len", "prompt",
            )  # fmt: skip
        if params.min_tokens > room:
            raise RequestError(
                f"min_tokens={params.min_tokens}, but there is room for {room} tokens only", "min_tokens"
            )
        for name in ("allowed_token_ids", "stop_token_ids", "logit_bias"):
            for token in getattr(params, name) or ():
                if token >= limits.vocab_size:
                    raise RequestError(f"{name}: {token} is not in the vocabulary of {limits.vocab_size} tokens", name)
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > limits.vocab_size:
                raise RequestError(f"{name} exceeds the vocabulary of {limits.vocab_size} tokens", name)
        return room if params.max_tokens is None else min(params.max_tokens, room)

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Each word at the start of a text and after a space: tokenizers have different tokens for the two."""
        found: list[list[int]] = []
        for word in params.bad_words or ():
            for text in (word, " " + word.lstrip()):
                ids = self.tokenizer.encode(text, add_special_tokens=False)
                if ids and ids not in found:
                    found.append(ids)
        return found

    def chat_prompt(self, messages: Sequence[Message], options: Mapping[str, Any]) -> dict[str, Any]:
        """A conversation as a prompt, by the model's chat template. Tools get into it even where the template knows of
        none."""
        self.engine.check_generates()
        tokenizer, tools = self.tokenizer, options.get("tools")
        if tools and not options.get("continue_final_message") and options.get("add_generation_prompt", True):
            from octavo.chat import plan_chat

            named = ("tools", "chat_template", "continue_final_message", "add_generation_prompt")
            more = {name: value for name, value in options.items() if name not in named}
            return plan_chat(
                tokenizer, messages, SamplingParams(), tools=tools, chat_template=options.get("chat_template"),
                chat_template_kwargs=more,
            ).prompt  # fmt: skip
        text = tokenizer.apply_chat_template(list(messages), **options)
        return {"prompt": text}


def _languages(scheme: Scheme, prompt: Prompt) -> tuple[str | None, str | None]:
    """The model's codes of the languages that a prompt names, if it names any."""
    source, target = (prompt.get(name) if isinstance(prompt, Mapping) else None for name in ("source", "target"))
    return (None, None) if source is target is None else scheme.languages(source, target)
