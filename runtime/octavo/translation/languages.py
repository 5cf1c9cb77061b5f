"""Languages by their English names, ISO 639 codes, BCP 47 tags and FLORES-200 codes, and which of a model's codes each
means. By langcodes, which has the data of Unicode's CLDR. Called by the schemes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from octavo.errors import RequestError

_MACRO = {"nb": "no", "pbt": "ps", "quy": "qu", "fuv": "ff", "ayr": "ay", "dik": "din", "taq": "tmh", "ber": "tzm"}
"""Languages that are the usual member of a larger one, where CLDR does not say so."""
_MISNAMED = {"ns": "nso"}
"""Northern Sotho, as M2M100 calls it."""
_NOT_A_NAME = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8})*")


@dataclass(frozen=True, slots=True)
class Language:
    """A language with its script and region; "" where it was not said."""

    code: str
    script: str
    region: str

    @classmethod
    def of(cls, tag: str) -> Language | None:
        """From a tag such as "fr", "fra", "pt-BR", "fra_Latn", "zho_Hans"; None if it is none."""
        import langcodes

        try:
            tag = _MISNAMED.get(tag, tag).replace("_", "-")
            found = langcodes.get(langcodes.standardize_tag(tag, macro=True), normalize=False)
        except (ValueError, LookupError):
            return None
        code = found.language
        if not code or not found.is_valid():
            return None
        return cls(_MACRO.get(code, code), found.script or "", found.territory or "")

    def fit(self, other: Language) -> int:
        """How well this, which somebody asked for, is met by a model's `other`; 0: not at all."""
        if self.code != other.code:
            return 0
        (script, region), (its_script, its_region) = self._usual(), other._usual()
        if self.script and its_script != script:
            return 0
        return 1 + 4 * (script == its_script) + 2 * (region == its_region)

    def _usual(self) -> tuple[str | None, str | None]:
        """Script and region, the most likely ones where they were not said."""
        import langcodes

        tag = "-".join(part for part in (self.code, self.script, self.region) if part)
        full = langcodes.get(tag, normalize=False).maximize()
        return full.script, full.territory


def language_name(tag: str) -> str:
    """In English, for prompts and messages; the tag itself for one that is unknown."""
    import langcodes

    return str(langcodes.get(tag.replace("_", "-")).display_name()) if Language.of(tag) else tag


def parse(name: object, field: str) -> Language:
    """What a user typed. Raises `RequestError` that suggests the nearest names."""
    if not isinstance(name, str) or not name.strip():
        raise RequestError(f"{field} must be the name or the code of a language, not {name!r}", field)
    found = _parse(name.strip())
    if found is None:
        raise RequestError(f"{name!r} is no language that Octavo knows{_nearest(name, _names())}", field)
    return found


@lru_cache(maxsize=1024)
def _parse(name: str) -> Language | None:
    import langcodes

    if _NOT_A_NAME.fullmatch(name):
        found = Language.of(name)
        if found is not None:
            return found
    try:
        return Language.of(langcodes.find(name).to_tag())
    except Exception:  # LookupError as a rule; of some texts its trie makes a SystemError
        return None


class Languages:
    """Those of a model, by its own codes."""

    def __init__(self, codes: Iterable[str]) -> None:
        self.codes = tuple(codes)
        self._parsed = [(code, parsed) for code in self.codes if (parsed := Language.of(code)) is not None]

    def tags(self) -> tuple[str, ...]:
        """For each code the shortest BCP 47 tag that means it, as "fr" and "zh-Hant"; the code itself where none does.
        `find` takes them."""
        parsed = dict(self._parsed)
        return tuple(self._tag(code, parsed[code]) if code in parsed else code for code in self.codes)

    def _tag(self, code: str, parsed: Language) -> str:
        language, script, region = parsed.code, parsed.script, parsed.region
        tags = (language, f"{language}-{script}", f"{language}-{region}", f"{language}-{script}-{region}")
        return next((tag for tag in tags if Language.of(tag) and self.find(tag, "language") == code), code)

    def find(self, name: object, field: str) -> str:
        """The model's code for what a user typed. Raises `RequestError`."""
        if isinstance(name, str):
            lower = name.strip().lower()
            for code in self.codes:
                if code.lower() == lower:
                    return code
        wanted = parse(name, field)
        best, code = max(((wanted.fit(parsed), code) for code, parsed in self._parsed), default=(0, ""))
        if not best:
            names = {language_name(known): known for known in self.codes}
            hint = _nearest(str(name), [*names, *self.codes])
            raise RequestError(f"the model does not know {name!r} among its {len(self.codes)} languages{hint}", field)
        return code


@lru_cache(maxsize=1)
def _names() -> tuple[str, ...]:
    """English names of the languages that have a two-letter code, and of those of FLORES-200 by way of CLDR."""
    import langcodes
    from langcodes.data_dicts import LANGUAGE_ALPHA3

    return tuple(str(langcodes.get(code).display_name()) for code in LANGUAGE_ALPHA3)


def _nearest(name: str, known: Iterable[str]) -> str:
    by_lower = {text.lower(): text for text in known}
    near = [by_lower[text] for text in difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.6)]
    return f": did you mean {' or '.join(map(repr, near))}?" if near else ""
