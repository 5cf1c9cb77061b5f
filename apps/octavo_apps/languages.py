"""The languages that the translation app offers for a model that is asked by a prompt, and which of them a text is in.
Called by `translator` and the page."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_ISO = {
    "af": "Afrikaans", "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech",
    "cy": "Welsh", "da": "Danish", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian",
    "eu": "Basque", "fa": "Persian", "fi": "Finnish", "fr": "French", "ga": "Irish", "gl": "Galician",
    "gu": "Gujarati", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian",
    "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ka": "Georgian", "kk": "Kazakh",
    "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian", "mk": "Macedonian", "ml": "Malayalam", "mr": "Marathi",
    "ms": "Malay", "nl": "Dutch", "no": "Norwegian", "pa": "Punjabi", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sq": "Albanian", "sr": "Serbian",
    "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Filipino", "tr": "Turkish",
    "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Language:
    """A language by its English name and its code of ISO 639-1."""

    name: str
    code: str


ALL = tuple(sorted(Language(name, code) for code, name in _ISO.items()))


BY_CODE = {language.code: language for language in ALL}
ENOUGH = 60
"""Letters from which on a language is believed that is not among those expected."""


def detect(text: str, among: Collection[str]) -> str | None:
    """The code of the language that `text` is most likely in; None for a text without letters. A short text is taken to
    be in one of those `among`; a long one may turn out to be in another.

    By py3langid: a naive Bayes classifier over byte n-grams (Lui and Baldwin, "langid.py", 2012), whose model comes
    with the package. It loads in a second, at the first call, and may be wrong on a word or two.
    """
    letters = sum(map(str.isalpha, text[:4000]))
    if not letters:
        return None
    ranked = [str(code) for code, _ in _classifier().rank(text[:4000])]
    return next(code for code in ranked if code in among or letters >= ENOUGH)


@lru_cache(maxsize=1)
def _classifier() -> Any:
    import py3langid

    py3langid.rank("load")
    return py3langid
