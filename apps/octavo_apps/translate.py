"""The translation app: what stands on the page, and what happens when something is pressed.

A text is translated sentence by sentence, all of them in one batch of the engine; `translation` has the work,
`documents` the files, `translator` the model.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import gradio as gr
from octavo.async_llm import AsyncLLM
from octavo.errors import OctavoError, RequestError
from octavo.models.sources import DEFAULT_MODEL

from octavo_apps import storage
from octavo_apps.engines import Engines
from octavo_apps.languages import Language, language
from octavo_apps.look import READY, Updates, notice, sentence_of, title
from octavo_apps.offers import ANY, Offer, Offers
from octavo_apps.translate_checks import OPEN, check_text, languages_of, loading
from octavo_apps.translate_file import FileTab
from octavo_apps.translate_view import CLICKED, shown
from octavo_apps.translation import Run, Translation
from octavo_apps.translator import Translator, translator_of

logger = logging.getLogger("octavo")

History = dict[str, Translation]

APP = "translate"
"""Names its entries in the browser's storage."""
CHOICES = 5
"""Beams that are searched for a sentence; each that says something else is offered."""

_DETECT = ("Detect language", OPEN)


def translate_blocks(model: str = DEFAULT_MODEL, **settings: Any) -> gr.Blocks:
    """The translation app as Gradio blocks. Arguments are those of `LLM` (`ConfigError`); nothing is loaded before the
    first text. Show it with `serve`."""
    return TranslatePage(Engines(model, **settings)).blocks


class TranslatePage:
    """The page and its events."""

    def __init__(self, engines: Engines, translator: Callable[[AsyncLLM], Translator] = translator_of) -> None:
        self.engines, self.translator, self.offers = engines, translator, Offers(engines)
        self.running: dict[str, Run] = {}  # by session
        self.blocks: gr.Blocks = gr.Blocks(title="Octavo translate", analytics_enabled=False)
        with self.blocks:
            self._sidebar()
            with gr.Column(elem_classes=["page", "wide"]):
                self.title = gr.HTML(title("Translate", self.engines.default), padding=False)
                self._languages()
                self.notice = gr.HTML("", padding=False, elem_id="notice")
                with gr.Tabs():
                    with gr.Tab("Text"):
                        self._text_tab()
                    with gr.Tab("File"):
                        self.files = FileTab(self)
            self.translation = gr.State(None)
            self.history = gr.State({})
            self.chosen = gr.State(0)
            self.kept = gr.Textbox(visible="hidden", label="kept")
            self.plain = gr.Textbox(visible="hidden", label="plain")
            self._events()

    # ---------------------------------------------------------------- what stands there

    def _sidebar(self) -> None:
        with gr.Sidebar(width=280, open=False, elem_classes="side", label="Earlier translations and model"):
            self.new = gr.Button("New translation", elem_id="new-translation")
            self.list = gr.Radio([], label="Earlier translations", elem_classes="list")
            self.delete = gr.Button("Delete", size="sm")
            with gr.Accordion("Model", open=False):
                self.model = gr.Dropdown(
                    self.engines.names(), value=self.engines.default, allow_custom_value=True, label="Model",
                    info="Any folder, GGUF file or Hugging Face id.",
                )  # fmt: skip

    def _languages(self) -> None:
        with gr.Row(elem_classes="languages", equal_height=True):
            self.source = gr.Dropdown(
                [_DETECT, *_choices(ANY.sources)], value=OPEN, label="From", filterable=True, elem_id="from", scale=5,
                num_choices_shown=1000,
            )  # fmt: skip
            self.swap = gr.Button("Swap", elem_id="swap", scale=1, min_width=70)
            self.target = gr.Dropdown(
                _choices(ANY.targets), value="de", label="To", filterable=True, elem_id="to", scale=5,
                num_choices_shown=1000,
            )  # fmt: skip

    def _text_tab(self) -> None:
        with gr.Row(elem_classes="sides", equal_height=True):
            self.text = gr.Textbox(
                label="Text", placeholder="Write or paste a text", lines=9, max_lines=18, interactive=False,
                elem_id="source", min_width=280,
            )  # fmt: skip
            self.result = gr.HTML(
                shown(None), js_on_load=CLICKED, elem_id="result", min_width=280, padding=False,
            )  # fmt: skip
        with gr.Row(elem_classes="actions"):
            self.go = gr.Button("Translate", variant="primary", elem_id="go")
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
            self.copy = gr.Button("Copy translation", elem_id="copy")
        self.alternatives = gr.Radio([], label="Other translations", visible=False, elem_id="alternatives")

    def _events(self) -> None:
        outputs = [
            self.text, self.result, self.notice, self.go, self.stop, self.alternatives, self.list, self.kept,
            self.title, self.plain, self.source, self.target, self.translation, self.history, self.chosen,
        ]  # fmt: skip
        streaming: dict[str, Any] = {
            "concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private",
        }  # fmt: skip
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        languages = [self.source, self.target, self.model]
        self.go.click(self._translate, [self.text, *languages, self.history], outputs, **streaming)
        gr.on([self.stop.click, self.files.stop.click], self._stop, None, None, **quick)
        self.files.events()
        pickers = [self.source, self.target]
        self.model.change(self._offer, [self.model, *pickers], pickers, **quick)
        swapped = [self.text, self.source, self.target, self.translation, self.model]
        self.swap.click(self._swap, swapped, outputs, **quick)
        offered = [self.alternatives, self.chosen, self.notice]
        self.result.click(self._alternatives, [self.translation, self.model], offered, **streaming)
        self.alternatives.input(
            self._choose, [self.alternatives, self.chosen, self.translation, self.history], outputs, **quick
        )
        self.copy.click(None, [self.plain], js=storage.COPY)
        self.new.click(self._start_anew, [self.history], outputs, **quick)
        self.list.input(self._open, [self.list, self.history, self.model], outputs, **quick)
        self.list.change(None, [self.list], js=storage.opened(APP))
        self.delete.click(None, [self.list], js=storage.remove(APP)).then(
            self._delete, [self.list, self.history], outputs, **quick
        )
        self.kept.change(None, [self.kept], js=storage.save(APP))
        loaded = self.blocks.load(self._load, [self.kept], outputs, js=storage.load(APP), **quick)
        loaded.then(None, js=READY)

    # ---------------------------------------------------------------- texts

    async def _translate(
        self, request: gr.Request, text: str, source: str, target: str, model: str, history: History
    ) -> AsyncIterator[Updates]:
        session = str(request.session_hash)
        translation: Translation | None = None
        run, problem = Run(), ""
        try:
            self.check_free(session)
            check_text(text)
            self.running[session] = run
            waits = "" if self.engines.is_loaded(model) else loading(model)
            yield {self.notice: waits, self.go: gr.update(visible=False), self.stop: gr.update(visible=True)}
            async with self.engines.use(model) as llm:
                translator = self.translator(llm)
                offer, pickers = await self.offered(model, source, target)
                yield {self.notice: ""} | pickers
                pair = await languages_of(text, source, target, offer)
                translation = Translation.of(text, pair[0].code, pair[1].code, detected=source == OPEN)
                yield {
                    self.notice: "", self.title: title("Translate", model), self.result: shown(translation, busy=True),
                    self.alternatives: gr.update(visible=False),
                }  # fmt: skip
                async with aclosing(run.progress(translator, translation.sentences, *pair)) as steps:
                    async for _ in steps:
                        if self.running.get(session) is run:
                            yield {self.result: shown(translation, busy=True)}
                problem = "Stopped." if run.stopped else ""
        except OctavoError as error:
            problem = sentence_of(error)
        except Exception as error:
            logger.exception("the translation app failed")
            problem = f"The app failed ({type(error).__name__}: {error}). The next text may work."
        finally:
            left = run.stopped and self.running.get(session) is not run
            if self.running.get(session) is run:
                del self.running[session]
        if left:
            if translation is not None:
                history[translation.id] = translation
            return
        updates = {
            self.notice: notice(problem), self.go: gr.update(visible=True), self.stop: gr.update(visible=False),
        }  # fmt: skip
        if translation is not None:
            updates |= self._whole(translation, history)
        yield updates

    def check_free(self, session: str) -> None:
        """Raises `RequestError` while another translation of this tab is made."""
        if session in self.running:
            raise RequestError("A translation is being made: wait for its end, or stop it.")

    async def offered(self, model: str, source: str, target: str) -> tuple[Offer, Updates]:
        """The model's languages, and the pickers if they are known only now that it is loaded."""
        known = self.offers.known(model)
        offer = await asyncio.to_thread(self.offers.of, model)
        return offer, {} if known or offer is ANY else self._pickers(offer, source, target)

    async def _offer(self, model: str, source: str, target: str) -> Updates:
        return self._pickers(await asyncio.to_thread(self.offers.of, model), source, target)

    def _pickers(self, offer: Offer, source: str, target: str) -> Updates:
        source, target = offer.settled(source, target)
        return {
            self.source: gr.update(choices=[_DETECT, *_choices(offer.sources)], value=source),
            self.target: gr.update(choices=_choices(offer.targets), value=target),
        }  # fmt: skip

    async def _stop(self, request: gr.Request) -> None:
        run = self.running.get(str(request.session_hash))
        if run is not None:
            run.stop()

    def _leave(self, request: gr.Request) -> Updates:
        """What is being translated is no longer looked at: it ends, and stays in the history."""
        run = self.running.pop(str(request.session_hash), None)
        if run is not None:
            run.stop()
        return {
            self.notice: "", self.go: gr.update(visible=True), self.stop: gr.update(visible=False),
            self.alternatives: gr.update(visible=False),
        }  # fmt: skip

    async def _swap(
        self, request: gr.Request, text: str, source: str, target: str, translation: Translation | None, model: str
    ) -> Updates:
        if translation is not None and translation.original == text:  # the translation becomes the text
            source, text = translation.source, translation.text
        if source == OPEN:
            return {self.notice: notice("Choose a language to swap with, or translate a text first.")}
        offer = await asyncio.to_thread(self.offers.of, model)
        if offer.settled(target, source) != (target, source):
            names = f"{language(target).name} to {language(source).name}"
            return {self.notice: notice(f"This model does not translate from {names}.")}
        return self._leave(request) | {
            self.source: target, self.target: source, self.text: text, self.result: shown(None), self.translation: None,
        }  # fmt: skip

    async def _alternatives(
        self, click: gr.EventData, translation: Translation | None, model: str
    ) -> AsyncIterator[Updates]:
        number = click._data.get("sentence") if isinstance(click._data, dict) else None
        if translation is None or not isinstance(number, int) or not 0 <= number < len(translation.sentences):
            return
        one = translation.sentences[number]
        yield {self.notice: notice("Looking for other translations …", wrong=False)}
        try:
            async with self.engines.use(model) as llm:
                pair = language(translation.source), language(translation.target)
                found = await self.translator(llm).alternatives(one.source, *pair, CHOICES)
        except OctavoError as error:
            yield {self.notice: notice(sentence_of(error))}
            return
        choices = list(dict.fromkeys([one.text, *found]))
        yield {
            self.notice: "", self.chosen: number,
            self.alternatives: gr.update(
                choices=choices, value=one.text, visible=True, label=f"Other translations of “{one.source}”"
            ),
        }  # fmt: skip

    def _choose(self, text: str, number: int, translation: Translation | None, history: History) -> Updates:
        if translation is None:
            return {}
        translation.sentences[number].text = text
        return self._whole(translation, history)

    # ---------------------------------------------------------------- history

    def _whole(self, translation: Translation | None, history: History) -> Updates:
        """Everything that shows which translation is open."""
        if translation is not None:
            history[translation.id] = translation
        order = sorted(history.values(), key=lambda one: -one.changed)
        listed = gr.update(
            choices=[(one.title, one.id) for one in order], value=translation.id if translation is not None else None
        )
        return {
            self.result: shown(translation), self.translation: translation, self.history: history, self.list: listed,
            self.kept: translation.to_json() if translation is not None else "",
            self.plain: translation.text if translation is not None else "",
        }  # fmt: skip

    async def _start_anew(self, request: gr.Request, history: History) -> Updates:
        return self._leave(request) | self._whole(None, history) | {self.text: ""}

    async def _open(self, request: gr.Request, id: str, history: History, model: str) -> Updates:
        one = history.get(id)
        if one is None:
            return await self._start_anew(request, history)
        wanted = OPEN if one.detected else one.source, one.target
        offer = await asyncio.to_thread(self.offers.of, model)
        languages = dict(zip((self.source, self.target), wanted, strict=True))
        if offer.settled(*wanted) != wanted:  # another model's
            languages = {}
        return self._leave(request) | self._whole(one, history) | languages | {self.text: one.original}

    async def _delete(self, request: gr.Request, id: str | None, history: History) -> Updates:
        history.pop(id or "", None)
        return await self._start_anew(request, history)

    async def _load(self, request: gr.Request, kept: str) -> Updates:
        history: History = {}
        opened: str = ""
        try:
            found = json.loads(kept)
            opened = str(found["open"])
            for text in found["entries"]:
                try:
                    one = Translation.from_json(text)
                except ValueError:
                    continue  # written by hand, or by another version
                history[one.id] = one
        except (ValueError, TypeError, KeyError):
            logger.warning("the browser sent translations that cannot be read")
        model = self.engines.default  # a new page has chosen no other
        updates = await self._open(request, opened, history, model)
        offer = await asyncio.to_thread(self.offers.of, model)
        if offer is not ANY:
            pair = updates.get(self.source, OPEN), updates.get(self.target, "")
            updates |= self._pickers(offer, *pair)
        return updates | {self.text: gr.update(value=updates[self.text], interactive=True)}


def _choices(languages: Sequence[Language]) -> list[tuple[str, str]]:
    return [(one.name, one.code) for one in languages]
