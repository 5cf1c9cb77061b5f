"""Which language a text is in, and whether that is sure. Called by the checks of the translation page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from octavo_apps.languages import Language, language

SURE = 0.5
"""Probability from which on a guess is believed. Of 60 words and short sentences in 25 languages all that reached it
were right, and none of the wrong ones came to 0.3."""
AHEAD = 1.5
"""Times the probability of the next: between two languages one of them always has half of it."""
READ = 4000
"""Characters that are looked at."""


@dataclass(frozen=True)
class Guess:
    """`found`: the most likely language; it may be one that was not asked for. `near`: those that come next."""

    found: Language
    sure: bool
    near: Sequence[Language] = ()


def detect(text: str, among: Sequence[Language]) -> Guess | None:
    """None for a text without letters.

    By py3langid: a naive Bayes classifier over byte n-grams (Lui and Baldwin, "langid.py", 2012), whose model comes
    with the package and loads in a second, at the first call. It looks at all its 140 languages first: what is surely
    French is not taken to be English by a model that reads no other. What is not sure is decided `among` those that can
    be meant.
    """
    read = text[:READ]
    if not any(map(str.isalpha, read)):
        return None
    ranked = [(str(code), float(probability)) for code, probability in _identifier().rank(read)]
    own = {one.base: one for one in sorted(among, key=lambda one: -len(one.code))}  # "zh" rather than "zh-Hant"
    if _sure(ranked[0][1], ranked[1][1]):
        meant = language(ranked[0][0])
        return Guess(own.get(meant.base, meant), sure=True)
    possible = [(own[base], share) for code, share in ranked if (base := language(code).base) in own]
    if not possible:
        return Guess(language(ranked[0][0]), sure=False)
    whole = sum(share for _, share in possible)
    found, *near = (one for one, _ in possible)
    shares = [share / whole for _, share in possible] + [0.0]
    return Guess(found, _sure(shares[0], shares[1]), near[:2])


def _sure(first: float, second: float) -> bool:
    return first >= SURE and first >= AHEAD * second


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
