"""How the apps look: one theme of Gradio's base, one accent colour, the system's own fonts, light and dark. Both apps
share it; nothing is fetched from anywhere."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from octavo.errors import ConfigError, OctavoError, RequestError

Updates = dict[Any, Any]
"""What an event changes on the page: new values by component."""
SYSTEM_FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
CODE_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")

ACCENT = gr.themes.Color(
    "#eef6f5", "#d5ebe8", "#abd6d0", "#7bbdb4", "#4aa196", "#1f7a70", "#1a6a61", "#165850", "#124640", "#0e3631",
    "#092421", name="sea",
)  # fmt: skip
GREY = gr.themes.Color(
    "#fafaf9", "#f4f4f2", "#e7e6e3", "#d5d4d0", "#a5a39d", "#75736c", "#56544e", "#403f3a", "#292825", "#1d1c1a",
    "#141412", name="stone",
)  # fmt: skip

READY = """() => {
    const button = document.querySelector(".side:not(.open) .toggle-button");
    if (button && window.innerWidth >= 1000) button.click();
    const name = () => document.querySelectorAll("fieldset:not([aria-labelledby])").forEach((group, number) => {
        const label = group.querySelector("[data-testid=block-info]");
        if (!label) return;
        label.id ||= "group-" + number + "-" + Date.now();
        group.setAttribute("aria-labelledby", label.id);
    });
    name();
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
    for (const input of document.querySelectorAll(".languages input"))
        input.addEventListener("focus", () => {
            input.select();
            setTimeout(() => {
                const list = document.getElementById(input.getAttribute("aria-controls"));
                const chosen = list?.querySelector("[aria-selected=true]");
                if (chosen) list.scrollTop = chosen.offsetTop - list.clientHeight / 2;
            }, 100);
        });
    const languages = document.querySelector(".languages");
    let key = "";
    languages?.addEventListener("keydown", event => { key = event.key; });
    languages?.addEventListener("blur", event => {
        if (key !== "Enter" || !event.isTrusted) return;
        event.stopPropagation();
        const input = event.target;
        setTimeout(() => input !== document.activeElement && input.dispatchEvent(new FocusEvent("blur")), 20);
    }, true);
    setTimeout(() => document.querySelector("#message textarea, #source textarea")?.focus(), 50);
}"""
"""Runs when a page can be used: where there is room, the sidebar stands open; the cursor is where one writes; what
is typed into a list of languages searches at once, and the list opens where the chosen one stands (Gradio measures
before the list has its width, and opens it at its end); after Enter the list hears a little later that it lost the
cursor, because Gradio takes what Enter chose some tasks after the key, and would drop it; groups of choices get their
visible labels as names for screen readers, which Gradio leaves out."""

CSS = Path(__file__).with_name("look.css")


def theme() -> gr.themes.Base:
    """Calm: flat surfaces, thin lines, one colour for what can be pressed."""
    return gr.themes.Base(
        primary_hue=ACCENT, secondary_hue=ACCENT, neutral_hue=GREY, font=SYSTEM_FONTS, font_mono=CODE_FONTS,
        radius_size=gr.themes.sizes.radius_md, spacing_size=gr.themes.sizes.spacing_md,
        text_size=gr.themes.sizes.text_md,
    ).set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        block_background_fill="white", block_background_fill_dark="*neutral_900",
        block_border_width="1px", block_border_color="*neutral_200", block_border_color_dark="*neutral_800",
        block_label_background_fill="transparent", block_label_background_fill_dark="transparent",
        block_label_border_width="0px", block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_400", block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_300", block_title_text_weight="500",
        input_background_fill="white", input_background_fill_dark="*neutral_900",
        input_border_color="*neutral_300", input_border_color_dark="*neutral_700",
        input_border_color_focus="*primary_500", input_border_color_focus_dark="*primary_400",
        button_primary_background_fill="*primary_500", button_primary_background_fill_hover="*primary_600",
        button_primary_background_fill_dark="*primary_500", button_primary_background_fill_hover_dark="*primary_400",
        button_primary_text_color="white", button_primary_text_color_dark="white",
        button_secondary_background_fill="*neutral_100", button_secondary_background_fill_hover="*neutral_200",
        button_secondary_background_fill_dark="*neutral_800",
        button_secondary_background_fill_hover_dark="*neutral_700",
        link_text_color="*primary_600", link_text_color_dark="*primary_300",
        border_color_primary="*neutral_200", border_color_primary_dark="*neutral_800",
    )  # fmt: skip


def notice(sentence: str = "", *, wrong: bool = True) -> str:
    """A sentence for the user, as HTML that a screen reader speaks; empty takes it away."""
    if not sentence:
        return ""
    kind, role = ("wrong", "alert") if wrong else ("plain", "status")
    return f'<p class="notice {kind}" role="{role}">{escape(sentence)}</p>'


def sentence_of(error: OctavoError) -> str:
    """An error as a sentence; it names the field that is wrong, if the message does not."""
    text = str(error).strip()
    if isinstance(error, ConfigError | RequestError) and error.field and error.field not in text:
        text = f"{error.field}: {text}"
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def title(name: str, model: str) -> str:
    """The head of a page, as HTML."""
    return f'<div class="title"><h1>{escape(name)}</h1><p>{escape(model)}</p></div>'
