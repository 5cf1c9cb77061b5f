"""The chat app: what stands on the page, and what happens when something is pressed.

A conversation's truth is a `Conversation` in the session; the page shows it, the browser's storage keeps it. An answer
is one asynchronous generator on the engine (`answering`), so that any number of tabs are answered in one batch without
a thread for each.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import gradio as gr
from octavo.errors import OctavoError, RequestError
from octavo.models.sources import DEFAULT_MODEL
from octavo.sampling_params import SamplingParams

from octavo_apps import storage
from octavo_apps.answering import Answer
from octavo_apps.conversation import Conversation
from octavo_apps.engines import Engines
from octavo_apps.figures import strip
from octavo_apps.look import READY, Updates, notice, sentence_of, title

logger = logging.getLogger("octavo")

Library = dict[str, Conversation]

APP = "chat"
"""Names its entries in the browser's storage."""
PLACEHOLDER = "## What would you like to know?\nAnswers are made on this machine, and nothing leaves it."


def chat_blocks(model: str = DEFAULT_MODEL, **settings: Any) -> gr.Blocks:
    """The chat app as Gradio blocks. Arguments are those of `LLM` (`ConfigError`); nothing is loaded before the first
    message. Show it with `serve`."""
    return ChatPage(Engines(model, **settings)).blocks


class ChatPage:
    """The page and its events."""

    def __init__(self, engines: Engines) -> None:
        self.engines = engines
        self._running: dict[str, Answer] = {}  # by session
        self.blocks: gr.Blocks = gr.Blocks(title="Octavo chat", analytics_enabled=False, fill_height=True)
        with self.blocks:
            self._sidebar()
            self._middle()
            self._session()
            self._events()

    # ---------------------------------------------------------------- what stands there

    def _sidebar(self) -> None:
        with gr.Sidebar(width=280, open=False, elem_classes="side", label="Conversations and settings"):
            self.new = gr.Button("New chat", variant="secondary", elem_id="new-chat")
            self.list = gr.Radio([], label="Conversations", elem_id="conversations", elem_classes="list")
            with gr.Row(elem_classes="pair"):
                self.download = gr.Button("Download", size="sm", elem_id="download")
                self.delete = gr.Button("Delete", size="sm", elem_id="delete")
            with gr.Accordion("Model and settings", open=False, elem_id="settings"):
                self.model = gr.Dropdown(
                    self.engines.names(), value=self.engines.default, allow_custom_value=True, label="Model",
                    info="Any folder, GGUF file or Hugging Face id.", elem_id="model",
                )  # fmt: skip
                self.system = gr.Textbox(
                    label="System prompt", placeholder="How the model should answer", lines=3, max_lines=8,
                    elem_id="system",
                )  # fmt: skip
                self.temperature = gr.Slider(0, 2, 0.7, step=0.05, label="Temperature", info="0: the likeliest.")
                self.top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top p")
                self.top_k = gr.Slider(0, 200, 0, step=1, label="Top k", info="0 keeps all.")
                self.min_p = gr.Slider(0, 1, 0, step=0.01, label="Min p")
                self.penalty = gr.Slider(0.8, 2, 1, step=0.05, label="Repetition penalty")
                self.max_tokens = gr.Slider(16, 8192, 1024, step=16, label="Most tokens", elem_id="max-tokens")
                self.seed = gr.Number(
                    None, precision=0, label="Seed", info="The same seed gives the same answer.", placeholder="Any",
                )  # fmt: skip

    def _middle(self) -> None:
        with gr.Column(elem_classes="page", elem_id="chat-page"):
            self.title = gr.HTML(title("Chat", self.engines.default), padding=False)
            self.chatbot = gr.Chatbot(
                show_label=False, label="Conversation", elem_id="chat", editable="user", buttons=["copy"],
                placeholder=PLACEHOLDER, layout="bubble", height="60vh", allow_tags=False, container=False,
            )  # fmt: skip
            self.notice = gr.HTML("", padding=False, elem_id="notice")
            with gr.Row(elem_classes="compose", equal_height=False):
                self.box = gr.Textbox(
                    label="Your message", show_label=False, placeholder="Write a message", lines=1, max_lines=8,
                    scale=9, container=False, interactive=False, elem_id="message",
                )  # fmt: skip
                self.send = gr.Button("Send", variant="primary", scale=1, min_width=84, elem_id="send")
                self.stop = gr.Button("Stop", variant="stop", scale=1, min_width=84, visible=False, elem_id="stop")
            self.strip = gr.HTML(strip(None, None), padding=False, elem_id="figures")

    def _session(self) -> None:
        """What belongs to one tab, and ways between page and server that nobody sees."""
        self.conversation = gr.State(Conversation())
        self.library = gr.State({})
        self.kept = gr.Textbox(visible="hidden", elem_id="kept", label="kept")
        self.file = gr.Textbox(visible="hidden", label="file")
        self.file_name = gr.Textbox(visible="hidden", label="file name")

    def _events(self) -> None:
        sampling = [self.temperature, self.top_p, self.top_k, self.min_p, self.penalty, self.max_tokens, self.seed]
        how = [self.conversation, self.library, self.model, self.system, *sampling]
        shown = [
            self.chatbot, self.box, self.notice, self.strip, self.send, self.stop, self.kept, self.list, self.title,
            self.conversation, self.library,
        ]  # fmt: skip
        streaming: dict[str, Any] = {
            "outputs": shown, "concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private",
        }  # fmt: skip
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        gr.on([self.box.submit, self.send.click], self._ask, [self.box, *how], **streaming)
        self.chatbot.retry(self._again, how, **streaming)
        self.chatbot.edit(self._edited, how, **streaming)
        self.stop.click(self._stop, None, None, **quick)
        self.chatbot.undo(self._undo, [self.conversation, self.library], shown, **quick)
        gr.on([self.chatbot.clear, self.new.click], self._start_anew, [self.library], shown, **quick)
        self.list.input(self._open, [self.list, self.library], [*shown, self.system], **quick)
        self.list.change(None, [self.list], js=storage.opened(APP))
        self.delete.click(None, [self.list], js=storage.remove(APP)).then(
            self._delete, [self.conversation, self.library], shown, **quick
        )
        self.download.click(self._file, [self.conversation], [self.file, self.file_name, self.notice], **quick).then(
            None, [self.file, self.file_name], js=storage.DOWNLOAD
        )
        self.kept.change(None, [self.kept], js=storage.save(APP))
        self.blocks.load(self._load, [self.kept], [*shown, self.system], js=storage.load(APP), **quick).then(
            None, js=READY
        )

    # ---------------------------------------------------------------- answers

    async def _ask(
        self, request: gr.Request, text: str, conversation: Conversation, library: Library, *how: Any
    ) -> AsyncIterator[Updates]:
        if not text.strip():
            yield {self.notice: notice("Write a message first.")}
        elif (busy := self._busy(request)) is not None:
            yield busy
        else:
            conversation.ask(text.strip())
            async with aclosing(self._answer(request, conversation, library, *how, asked=text)) as steps:
                async for updates in steps:
                    yield updates

    async def _again(
        self, request: gr.Request, conversation: Conversation, library: Library, *how: Any
    ) -> AsyncIterator[Updates]:
        if (busy := self._busy(request)) is not None:
            yield busy
        elif not conversation.turns:
            yield {self.notice: notice("There is no question to answer again.")}
        else:
            conversation.back_to_question()
            async with aclosing(self._answer(request, conversation, library, *how)) as steps:
                async for updates in steps:
                    yield updates

    async def _edited(
        self, request: gr.Request, edit: gr.EditData, conversation: Conversation, library: Library, *how: Any
    ) -> AsyncIterator[Updates]:
        text = edit.value if isinstance(edit.value, str) else ""
        if (busy := self._busy(request)) is not None:
            yield busy | {self.chatbot: conversation.shown()}
        elif not text.strip():
            yield {self.notice: notice("A message cannot be empty."), self.chatbot: conversation.shown()}
        else:
            conversation.edit(edit.index if isinstance(edit.index, int) else edit.index[0], text)
            async with aclosing(self._answer(request, conversation, library, *how)) as steps:
                async for updates in steps:
                    yield updates

    async def _answer(
        self, request: gr.Request, conversation: Conversation, library: Library, model: str, system: str,
        *sampling: Any, asked: str = "",
    ) -> AsyncGenerator[Updates]:  # fmt: skip
        """Answer the last question. Whatever goes wrong becomes a sentence; the next message works. A message that is
        refused goes back to where it was written (`asked`). When another conversation was opened meanwhile, the page is
        left alone."""
        session, problem, answer = str(request.session_hash), "", None
        conversation.system = system
        library[conversation.id] = conversation
        waits = "" if self.engines.is_loaded(model) else f"{model} is being loaded. A new model is fetched first."
        yield {
            self.chatbot: conversation.shown(), self.box: "", self.notice: notice(waits, wrong=False),
            self.list: _listed(library, conversation), self.kept: conversation.to_json(),
            self.send: gr.update(visible=False), self.stop: gr.update(visible=True),
        }  # fmt: skip
        try:
            answer = self._running[session] = Answer(conversation, sampling_params(*sampling))
            async with self.engines.use(model.strip()) as llm:
                yield {self.notice: "", self.title: title("Chat", model)}
                async with aclosing(answer.run(llm)) as moments:
                    async for moment in moments:
                        if self._running.get(session) is answer:
                            yield {self.chatbot: conversation.shown(), self.strip: strip(moment, llm)}
            if answer.forgotten:
                problem = f"The {answer.forgotten} oldest messages no longer fit, and the model did not see them."
        except OctavoError as error:
            problem = sentence_of(error)
        except Exception as error:
            logger.exception("the chat app failed to answer")
            problem = f"The app failed ({type(error).__name__}: {error}). The next message may work."
        finally:
            left = answer is not None and self._running.get(session) is not answer
            if not left:
                self._running.pop(session, None)
        updates: Updates = {
            self.notice: notice(problem), self.send: gr.update(visible=True), self.stop: gr.update(visible=False),
        }  # fmt: skip
        if answer is None or not any(turn is answer.turn for turn in conversation.turns):  # refused
            question = conversation.undo()
            updates[self.box] = asked or question
        elif problem and not answer.turn.note and not answer.forgotten:
            answer.turn.note = "The answer ends here, because the model failed."
        yield {self.kept: conversation.to_json()} if left else updates | self._whole(conversation, library)

    def _busy(self, request: gr.Request) -> Updates | None:
        """The sentence that a tab gets which asks before its answer has ended."""
        if str(request.session_hash) not in self._running:
            return None
        return {self.notice: notice("An answer is being written: wait for its end, or stop it.")}

    def _stop(self, request: gr.Request) -> None:
        answer = self._running.get(str(request.session_hash))
        if answer is not None:
            answer.stop()

    def _leave(self, request: gr.Request) -> Updates:
        """What is being written is no longer looked at: it ends, and stays in its conversation."""
        answer = self._running.pop(str(request.session_hash), None)
        if answer is not None:
            answer.stop()
        return {self.notice: "", self.send: gr.update(visible=True), self.stop: gr.update(visible=False)}

    # ---------------------------------------------------------------- conversations

    def _whole(self, conversation: Conversation, library: Library) -> Updates:
        """Everything that shows which conversation is open."""
        if conversation.turns:
            library[conversation.id] = conversation
        return {
            self.chatbot: conversation.shown(), self.conversation: conversation, self.library: library,
            self.list: _listed(library, conversation), self.kept: conversation.to_json() if conversation.id else "",
        }  # fmt: skip

    def _undo(self, request: gr.Request, conversation: Conversation, library: Library) -> Updates:
        left = self._leave(request)
        question = conversation.undo()
        return left | self._whole(conversation, library) | {self.box: question}

    def _start_anew(self, request: gr.Request, library: Library) -> Updates:
        return self._leave(request) | self._whole(Conversation(), library) | {self.strip: strip(None, None)}

    def _open(self, request: gr.Request, id: str, library: Library) -> Updates:
        conversation = library.get(id) or Conversation()
        left = self._leave(request) | {self.system: conversation.system, self.strip: strip(None, None)}
        return left | self._whole(conversation, library)

    def _delete(self, request: gr.Request, conversation: Conversation, library: Library) -> Updates:
        library.pop(conversation.id, None)
        return self._start_anew(request, library)

    def _load(self, kept: str) -> Updates:
        library: Library = {}
        opened: Conversation | None = None
        try:
            found = json.loads(kept)
            for text in found["entries"]:
                try:
                    one = Conversation.from_json(text)
                except ValueError:
                    continue  # written by hand, or by another version
                if one.turns:
                    library[one.id] = one
            opened = library.get(found["open"])
        except (ValueError, TypeError, KeyError):
            logger.warning("the browser sent conversations that cannot be read")
        conversation = opened or Conversation()
        writable = gr.update(interactive=True)  # a message sent before would have been lost
        return self._whole(conversation, library) | {self.system: conversation.system, self.box: writable}

    def _file(self, conversation: Conversation) -> tuple[str, str, str]:
        if not conversation.turns:
            return "", "", notice("There is nothing to download yet.")
        return conversation.to_markdown(), f"octavo-{conversation.id}.md", ""


def sampling_params(
    temperature: float, top_p: float, top_k: float, min_p: float, penalty: float, max_tokens: float, seed: float | None
) -> SamplingParams:
    """From the page's controls. Raises `RequestError`."""
    if None in (temperature, top_p, top_k, min_p, penalty, max_tokens):
        raise RequestError("A setting is empty: every one but the seed needs a number.")
    return SamplingParams(
        temperature=temperature, top_p=top_p, top_k=int(top_k), min_p=min_p, repetition_penalty=penalty,
        max_tokens=int(max_tokens), seed=None if seed is None else int(seed),
    )  # fmt: skip


def _listed(library: Library, current: Conversation) -> Any:
    """The list of conversations, the last changed first."""
    order = sorted((one for one in library.values() if one.turns), key=lambda one: -one.changed)
    return gr.update(choices=[(one.title, one.id) for one in order], value=current.id if current in order else None)
