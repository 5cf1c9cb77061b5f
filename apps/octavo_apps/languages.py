"""Languages as the translation app offers them: by English name and BCP 47 tag. Called by `offers`, `translation` and
the page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from octavo.translation import languages as known

_LARGE = (
    "af ar bg bn ca cs cy da de el en es et eu fa fi fr ga gl gu he hi hr hu hy id is it ja ka kk ko lt lv mk ml mr ms "
    "nl no pa pl pt ro ru sk sl sq sr sv sw ta te th tl tr uk ur vi zh"
)
"""Languages that much is written in: a model that chats may have read of them."""


@dataclass(frozen=True, order=True)
class Language:
    """A language by its English name and its tag, as "fr" and "zh-Hant"."""

    name: str
    code: str

    @property
    def base(self) -> str:
        """Without script and region: what detection and the cutting of sentences know."""
        found = known.Language.of(self.code)
        return found.code if found is not None else self.code


@lru_cache(maxsize=1024)
def language(code: str) -> Language:
    """By its tag; its name is the tag where none is known."""
    return Language(known.language_name(code), code)


def is_language(code: str) -> bool:
    """A tag of a language that has a name."""
    return known.Language.of(code) is not None


def by_name(codes: Iterable[str]) -> tuple[Language, ...]:
    return tuple(sorted(map(language, codes)))


@lru_cache(maxsize=1)
def large() -> tuple[Language, ...]:
    """Offered where a model does not say which languages it knows."""
    return by_name(_LARGE.split())
