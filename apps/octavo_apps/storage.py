"""What a browser keeps of an app's work in its own storage: one entry for each conversation or translation, so that
several tabs do not overwrite one another's.

Scripts for Gradio's events; they run in the page, and the server keeps nothing. When the storage is full the oldest
make way.
"""

from __future__ import annotations


def save(app: str) -> str:
    """Takes one entry as JSON, with its "id" and when it "changed"."""
    return """(text) => {
        if (!text) return;
        const prefix = "octavo.APP.", one = JSON.parse(text);
        for (;;) {
            try { localStorage.setItem(prefix + one.id, text); return; }
            catch (full) {
                const age = key => {
                    try { return JSON.parse(localStorage.getItem(key)).changed; } catch { return 0; }
                };
                const others = Object.keys(localStorage)
                    .filter(key => key.startsWith(prefix) && key !== prefix + one.id)
                    .sort((a, b) => age(a) - age(b));
                if (!others.length) return;
                localStorage.removeItem(others[0]);
            }
        }
    }""".replace("APP", app)


def load(app: str) -> str:
    """Gives all entries, and the id of the one that this tab had open."""
    return """() => {
        const keys = Object.keys(localStorage).filter(key => key.startsWith("octavo.APP."));
        const entries = keys.map(key => localStorage.getItem(key));
        return JSON.stringify({open: sessionStorage.getItem("octavo.APP.open"), entries});
    }""".replace("APP", app)


def opened(app: str) -> str:
    """Takes the id of the entry that is open now."""
    return """(id) => { sessionStorage.setItem("octavo.APP.open", id || ""); }""".replace("APP", app)


def remove(app: str) -> str:
    """Takes an id."""
    return """(id) => { localStorage.removeItem("octavo.APP." + id); }""".replace("APP", app)


DOWNLOAD = """(text, name) => {
    if (!text) return;
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "text/markdown"}));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""
"""Takes a file's text and its name."""

COPY = """(text) => { if (text) navigator.clipboard.writeText(text); }"""
