"""The parts of the translation page that are HTML: the translation with its sentences, and a file's progress."""

from __future__ import annotations

from html import escape

from octavo_apps.languages import Language, language
from octavo_apps.translation import Translation

CLICKED = """
const choose = event => {
    const sentence = event.target.closest("[data-sentence]");
    if (!sentence || (event.type === "keydown" && event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    trigger("click", {sentence: Number(sentence.dataset.sentence)});
};
element.addEventListener("click", choose);
element.addEventListener("keydown", choose);
"""
"""The script of the translation: a sentence that is pressed becomes an event with its number."""


def progress(done: int, total: int, pair: tuple[Language, Language]) -> str:
    return (
        f'<label class="progress">{escape(pair[0].name)} to {escape(pair[1].name)}: {done} of {total} sentences'
        f'<progress value="{done}" max="{total}"></progress></label>'
    )


def shown(translation: Translation | None, *, busy: bool = False) -> str:
    """The translation as HTML: each sentence can be pressed."""
    if translation is None:
        hint = '<p class="hint">The translation comes here.</p>'
        return f'<section class="result" aria-label="Translation">{hint}</section>'
    names = [escape(language(code).name) for code in (translation.source, translation.target)]
    found = " (detected)" if translation.detected else ""
    body = "".join(
        f'{escape(one.gap)}<span role="button" tabindex="0" data-sentence="{number}" '
        f'title="Show other translations">{escape(one.text) or "…"}</span>'
        for number, one in enumerate(translation.sentences)
    )
    return (
        f'<section class="result" aria-label="Translation" aria-busy="{str(busy).lower()}">'
        f'<p class="pair">{names[0]}{found} to {names[1]}</p><div class="body">{body}</div></section>'
    )
