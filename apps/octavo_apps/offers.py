"""Which languages the translation page offers for a model: those of its files, before its weights are loaded. Called by
the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import OctavoError
from octavo.models.cache import list_cached
from octavo.models.seq2seq_config import is_seq2seq, load_seq2seq_config
from octavo.models.sources import resolve
from octavo.translation.scheme import Scheme, load_scheme

from octavo_apps.engines import Engines
from octavo_apps.languages import Language, by_name, large


@dataclass(frozen=True)
class Offer:
    """Languages to translate from and to, by name."""

    sources: Sequence[Language]
    targets: Sequence[Language]

    @classmethod
    def of(cls, scheme: Scheme | None) -> Offer:
        """A model that chats has no scheme."""
        if scheme is None:
            return ANY
        sources, targets = scheme.known()
        into = large() if targets is None else by_name(targets)
        return cls(sorted({*large(), *into}) if sources is None else by_name(sources), into)

    def settled(self, source: str, target: str) -> tuple[str, str]:
        """The two that were chosen, where they are offered, or others. "" stays: the source is open."""
        sources, targets = ([one.code for one in side] for side in (self.sources, self.targets))
        if len(sources) == 1:
            source = sources[0]
        if target not in targets:
            target = next((code for code in ("en", "de") if code in targets and code != source), targets[0])
        return source if source in sources else "", target


ANY = Offer(large(), large())


class Offers:
    """By the model's name. For one process; blocks for the seconds that a tokenizer takes."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._found: dict[str, Offer] = {}

    def known(self, model: str) -> bool:
        """`of` gives the model's own."""
        return model in self._found

    def of(self, model: str) -> Offer:
        """Of a model that is not on this machine `ANY`, until it is."""
        if model not in self._found:
            if self._engines.is_loaded(model):
                self._found[model] = Offer.of(self._engines.started(model).engine.scheme)
            elif Path(model).expanduser().exists() or any(one.name == model for one in list_cached()):
                try:
                    self._found[model] = Offer.of(_scheme_of(model))
                except OctavoError:
                    return ANY  # its first translation says what is wrong with it
        return self._found.get(model, ANY)


def _scheme_of(model: str) -> Scheme | None:
    files = resolve(model, need_weights=False)
    if not is_seq2seq(files):
        return None
    return load_scheme(files, load_seq2seq_config(files), trust_remote_code=False)
