"""Outputs of one request (`n > 1`) share the prompt: from whom the next one takes it over. Asked by the scheduler."""

from __future__ import annotations

from octavo.engine.draft import Draft
from octavo.engine.request import Sequence


def donor_of(sequence: Sequence, draft: Draft) -> Sequence | None:
    """A running sibling that had computed the prompt before this step, for a sequence without output of its own.
    (Copies run before the step's forward pass: what a sibling writes in this very step is not there yet.)"""
    if sequence.index == 0 or sequence.num_output:
        return None
    for other in sequence.request.sequences:
        if other.row >= 0 and other.scheduled >= other.num_prompt and not _prefills(other, draft):
            return other
    return None


def sibling_prefills(sequence: Sequence, draft: Draft) -> bool:
    """A sibling is computing the prompt right now: wait and fork from it."""
    if sequence.index == 0 or sequence.num_output or donor_of(sequence, draft):
        return False
    return any(
        other.row >= 0 and (other.scheduled < other.num_prompt or _prefills(other, draft))
        for other in sequence.request.sequences
    )


def _prefills(sequence: Sequence, draft: Draft) -> bool:
    """Part of the prompt (but for its last token) is computed by this step."""
    return any(part is sequence and step.start < part.num_prompt - 1 for part, _, step in draft.parts)
