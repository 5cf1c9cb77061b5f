"""`octavo chat`: a conversation on the terminal, or line by line from a pipe.

`Session` holds the conversation and answers one line at a time; `_lines` is where the lines come from.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from octavo.cli.options import (
    DEFAULT,
    DEFAULT_TEMPERATURE,
    DEFAULT_TOP_P,
    Debug,
    Device,
    Dtype,
    MaxModelLen,
    MaxTokens,
    MinP,
    Model,
    Quantization,
    Revision,
    Seed,
    Stop,
    System,
    Temperature,
    TopK,
    TopP,
    open_llm,
    sampling,
)
from octavo.cli.screen import console, figures, size, write
from octavo.errors import EngineClosedError, OctavoError, RequestError
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.llm import LLM

HELP = """\
/help            this list
/reset           forget the conversation (the system message stays)
/system TEXT     set the system message and start anew; without TEXT, show it; /system - takes it away
/set NAME VALUE  change a sampling parameter, as in /set temperature 0.2; without a value, show them
/stats           figures of the last answer and of the engine
/exit            leave (so does Ctrl-D)
Ctrl-C stops an answer, and clears a line; Alt-Enter starts a new line; arrow up brings back what you typed."""

SETTABLE = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop", "repetition_penalty", "presence_penalty",
    "frequency_penalty",
)
ROOM_SHARE = 4
"""Keep at least one part in four of the model's length for the answer: older turns make way for it."""


def chat(
    system: System = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = DEFAULT_TEMPERATURE,
    top_p: TopP = DEFAULT_TOP_P,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    seed: Seed = None,
    stop: Stop = None,
    model: Model = DEFAULT,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    max_model_len: MaxModelLen = None,
    debug: Debug = False,
) -> None:
    """Talk to a model.

    The answer streams as it is made; Ctrl-C stops it and leaves you in the conversation. Ctrl-D or /exit leaves, /help
    lists the other commands. Earlier turns stay in the KV cache, so a long conversation answers as fast as a short one.

    From a pipe every line is a turn:

      printf 'My name is Ada.\\nWhat is my name?\\n' | octavo chat
    """
    params = sampling(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, stop=stop
    )
    settings = {
        "revision": revision, "device": device, "dtype": dtype, "quantization": quantization,
        "max_model_len": max_model_len,
    }  # fmt: skip
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with open_llm(model, **settings) as llm:
        if interactive:
            console().print(f"[bold]{model}[/bold] [dim]ready. /help for commands, Ctrl-D to leave.[/dim]")
        session = Session(llm, params, system)
        failed = False
        for line in _lines(interactive):
            try:
                if not session.take(line):
                    break
            except KeyboardInterrupt:
                if not interactive:
                    raise
            except EngineClosedError:
                raise
            except OctavoError as error:
                failed = True
                console(stderr=True).print(str(error), style="red", markup=False)
    if failed and not interactive:  # a script must be able to see it
        raise SystemExit(1)


class Session:
    """One conversation."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self.llm, self.params, self.system = llm, params, system
        self.turns: list[dict[str, str]] = []
        self.last = ""
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print(HELP), "/?": lambda _: print(HELP), "/reset": self._reset,
            "/system": self._set_system, "/set": self._set, "/stats": self._stats,
        }  # fmt: skip

    def take(self, line: str) -> bool:
        """Obey a command or answer; False says that the conversation is over. Raises `OctavoError` for a bad line; the
        conversation is then as it was before."""
        line = line.strip()
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit", "/bye"):
            return False
        if word in self._commands:
            self._commands[word](rest.strip())
        elif line.startswith("/") and word[1:].isalpha():
            raise RequestError(f"{word} is no command: /help lists them")
        elif line:
            self.answer(line)
        return True

    def answer(self, text: str) -> None:
        """Stream the answer to `text`. Ctrl-C ends it early, with a `KeyboardInterrupt`; what was written stays part of
        the conversation."""
        turns = self._fitting([*self.turns, {"role": "user", "content": text}])
        pieces = self.llm.chat(self._messages(turns), self.params, stream=True)
        stopped = False
        try:
            for piece in pieces:
                write(piece.text)
        except KeyboardInterrupt:
            pieces.close()
            stopped = True
        write("\n")
        output = pieces.output
        self.turns = [*turns, {"role": "assistant", "content": output.text}]
        self.last = figures(output.metrics)
        if sys.stdout.isatty():
            console().print("stopped" if stopped else self.last, style="dim")
        if stopped:
            raise KeyboardInterrupt

    def _messages(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + turns

    def _fitting(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        """The turns that leave room for an answer: the oldest pair goes first, the last question never."""
        limit = self.llm.engine.limits.max_model_len
        room = min(self.params.max_tokens or limit, limit // ROOM_SHARE)
        dropped = 0
        while len(turns) > 2 and self._length(turns) > limit - room:
            turns, dropped = turns[2:], dropped + 1
        if dropped:
            console(stderr=True).print(f"(the oldest {dropped} turns no longer fit and are forgotten)", style="dim")
        return turns

    def _length(self, turns: list[dict[str, str]]) -> int:
        prompt = self.llm.chat_prompt(self._messages(turns), {"add_generation_prompt": True})
        return len(self.llm.tokenizer.encode(prompt["prompt"], add_special_tokens=False))

    # ---------------------------------------------------------------- commands

    def _reset(self, _: str) -> None:
        self.turns = []
        print("The conversation is forgotten.")

    def _set_system(self, text: str) -> None:
        if not text:
            print(self.system or "There is no system message.")
            return
        self.system = None if text == "-" else text
        self.turns = []
        print("The system message is set; the conversation starts anew.")

    def _set(self, text: str) -> None:
        name, _, value = text.replace("=", " ", 1).partition(" ")
        name = name.replace("-", "_")
        shown = [field.name for field in fields(SamplingParams) if field.name in SETTABLE]
        if name and name not in SETTABLE:
            raise RequestError(f"{name} cannot be set: choose one of {', '.join(shown)}")
        if value.strip():
            self.params = replace(self.params, **{name: _literal(value.strip())})
        for shown_name in [name] if name else shown:
            print(f"{shown_name} = {getattr(self.params, shown_name)!r}")

    def _stats(self, _: str) -> None:
        stats, limits = self.llm.stats(), self.llm.engine.limits
        print(f"last answer: {self.last or 'none yet'}")
        tokens = self._length(self.turns) if self.turns else 0
        print(f"conversation: {len(self.turns) // 2} turns, {tokens} of {limits.max_model_len} tokens")
        print(
            f"KV cache: {stats.blocks_total} blocks of {limits.block_size} tokens in {limits.kv_cache_dtype}; "
            f"{stats.blocks_used} used, {stats.blocks_cached} cached, {stats.blocks_free} free"
        )
        print(f"engine: {limits.device}, {limits.weights}, {stats.steps} steps, {stats.preemptions} preemptions")
        used = _resident()
        if used:
            print(f"memory of this process: {size(used)}")


def _literal(text: str) -> Any:
    """A number, None or a quoted string as Python reads it; anything else is the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _resident() -> int | None:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None  # no such file on this system


def _lines(interactive: bool) -> Iterator[str]:
    """What the user says, until the end of input."""
    if not interactive:
        for data in sys.stdin.buffer:
            yield data.decode("utf-8", errors="replace").rstrip("\r\n")
        return
    session = _prompt_session()
    while True:
        try:
            yield session.prompt("> ", multiline=False)
        except KeyboardInterrupt:
            continue  # the line is dropped, as in a shell
        except EOFError:
            return


def _prompt_session() -> Any:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    from octavo.models.cache import cache_dir

    path = cache_dir() / "chat_history"
    history: Any
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))  # what people ask a model is their own affair
        history = FileHistory(str(path))
    except OSError:
        history = InMemoryHistory()
    keys = KeyBindings()

    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    keys.add("escape", "enter")(new_line)

    return PromptSession(history=history, key_bindings=keys)
