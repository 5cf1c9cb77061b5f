"""The tab of the translation page that translates a file: upload, progress, download."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from octavo.errors import OctavoError

from octavo_apps.documents import DocumentError, open_document, translated_name
from octavo_apps.look import Updates, notice, sentence_of, title
from octavo_apps.translate_checks import languages_of, loading
from octavo_apps.translate_view import progress
from octavo_apps.translation import Run, Translation

if TYPE_CHECKING:
    from octavo_apps.translate import TranslatePage

logger = logging.getLogger("octavo")


class FileTab:
    """Made inside the page's tab; `events` once the page is complete."""

    def __init__(self, page: TranslatePage) -> None:
        self._page = page
        self.file = gr.File(label="A file: .txt, .md, .srt or .docx", elem_id="file", height=150)
        with gr.Row(elem_classes="actions"):
            self.go = gr.Button("Translate file", variant="primary", elem_id="go-file")
            self.stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop-file")
            self.download = gr.DownloadButton("Download", visible=False, elem_id="download")
        self.progress = gr.HTML("", padding=False, elem_id="progress")

    def events(self) -> None:
        page = self._page
        self.go.click(
            self._translate, [self.file, page.source, page.target, page.model],
            [
                page.notice, page.title, self.progress, self.download, self.go, self.stop, page.source, page.target,
            ],
            concurrency_limit=None, show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        self.file.change(
            lambda: ("", gr.update(visible=False), ""), None, [self.progress, self.download, page.notice],
            queue=False, show_progress="hidden", api_visibility="private",
        )  # fmt: skip

    async def _translate(
        self, request: gr.Request, path: str | None, source: str, target: str, model: str
    ) -> AsyncIterator[Updates]:
        page, session = self._page, str(request.session_hash)
        run, problem = Run(), ""
        updates: Updates = {self.progress: ""}
        try:
            page.check_free(session)
            if path is None:
                raise DocumentError("Choose a file first.")
            name = Path(path).name
            document = await asyncio.to_thread(lambda: open_document(name, Path(path).read_bytes()))
            page.running[session] = run
            yield {
                page.notice: "" if page.engines.is_loaded(model) else loading(model), self.progress: "",
                self.go: gr.update(visible=False), self.stop: gr.update(visible=True),
                self.download: gr.update(visible=False),
            }  # fmt: skip
            async with page.engines.use(model) as llm:
                translator = page.translator(llm)
                offer, pickers = await page.offered(model, source, target)
                yield {page.notice: ""} | pickers
                pair = await languages_of("\n".join(document.texts), source, target, offer)
                texts = [Translation.of(text, pair[0].code, pair[1].code) for text in document.texts]
                items = [one for text in texts for one in text.sentences]
                yield {page.notice: "", page.title: title("Translate", model)}
                async with aclosing(run.progress(translator, items, *pair)) as steps:
                    async for done in steps:
                        yield {self.progress: progress(done, len(items), pair)}
            if run.stopped:
                problem = "Stopped: there is no file."
            else:
                new = await asyncio.to_thread(document.rebuilt, texts)
                updates = {self.download: _offered(translated_name(name, pair[1].code), new)}
        except OctavoError as error:
            problem = sentence_of(error)
        except Exception as error:
            logger.exception("the translation app failed on a file")
            problem = f"The app failed ({type(error).__name__}: {error}). The next file may work."
        finally:
            if page.running.get(session) is run:
                del page.running[session]
        ended = {self.go: gr.update(visible=True), self.stop: gr.update(visible=False)}
        yield {page.notice: notice(problem), **ended, **updates}


def _offered(name: str, data: bytes) -> Any:
    """The download button with a file behind it, in a folder of its own, which Gradio copies to its cache."""
    path = Path(tempfile.mkdtemp(prefix="octavo-")) / name
    path.write_bytes(data)
    return gr.update(value=str(path), visible=True, label=f"Download {name}")
