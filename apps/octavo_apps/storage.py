"""Conversations in the browser's own storage: one entry each, so that several tabs do not overwrite one another's.

Scripts for Gradio's events; they run in the page, and the server keeps nothing. When the storage is full the oldest
make way.
"""

from __future__ import annotations

SAVE = """(text) => {
    if (!text) return;
    const prefix = "octavo.chat.", one = JSON.parse(text);
    sessionStorage.setItem("octavo.open", one.id);
    for (;;) {
        try { localStorage.setItem(prefix + one.id, text); return; }
        catch (full) {
            const others = Object.keys(localStorage).filter(key => key.startsWith(prefix) && key !== prefix + one.id);
            const age = key => { try { return JSON.parse(localStorage.getItem(key)).changed; } catch { return 0; } };
            others.sort((a, b) => age(a) - age(b));
            if (!others.length) return;
            localStorage.removeItem(others[0]);
        }
    }
}"""
"""Takes a conversation as JSON."""

LOAD = """() => {
    const keys = Object.keys(localStorage).filter(key => key.startsWith("octavo.chat."));
    return JSON.stringify({
        open: sessionStorage.getItem("octavo.open"), conversations: keys.map(key => localStorage.getItem(key)),
    });
}"""
"""Gives all of them, and the id of the one that this tab had open."""

OPEN = """(id) => { sessionStorage.setItem("octavo.open", id); }"""

REMOVE = """(id) => { localStorage.removeItem("octavo.chat." + id); sessionStorage.removeItem("octavo.open"); }"""

DOWNLOAD = """(text, name) => {
    if (!text) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "text/markdown"}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""
"""Takes a file's text and its name."""
