"""A step while the scheduler plans it, and afterwards the record of what was launched, by which it is committed or
rolled back."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.engine.plan import NewRow, NewSource, RowStep, SearchedStep, StepPlan
from octavo.engine.request import Sequence


@dataclass(slots=True)
class Draft:
    """A step under construction, and afterwards the record of what was launched."""

    parts: list[tuple[Sequence, int, RowStep]] = field(default_factory=list)
    """(sequence, its epoch, its step)."""
    new_rows: list[NewRow] = field(default_factory=list)
    new_blocks: dict[tuple[int, int], int] = field(default_factory=dict)
    """(row, index in its block table) -> block. A fork's shared block and the copy it writes to have the same place:
    one entry, because a device applies several in any order."""
    copies: dict[int, int] = field(default_factory=dict)
    """Destination block -> source block."""
    sources: list[NewSource] = field(default_factory=list)
    tokens: list[tuple[int, int, int]] = field(default_factory=list)
    """See `StepPlan.tokens`."""
    searching: bool = False
    """There are beams among the parts."""
    preempted: bool = False
    shared_blocks: int = 0

    def plan(self) -> StepPlan:
        copies = [(source, destination) for destination, source in self.copies.items()]
        new_blocks = [(row, index, block) for (row, index), block in self.new_blocks.items()]
        steps = [step for _, _, step in self.parts]
        return StepPlan(
            steps, self.new_rows, new_blocks, copies, self.shared_blocks, self.masked(), self.sources, self.tokens,
            self._searched(),
        )  # fmt: skip

    @property
    def overlaps(self) -> bool:
        """Something of it can go on before its results are known. Beams cannot: where there is nothing else, the step
        is waited for, so that searches stay in one step instead of taking turns."""
        return not self.searching or any(sequence.beam is None for sequence, _, _ in self.parts)

    def masked(self) -> tuple[int, ...]:
        """Places in `parts` that sample under a grammar."""
        return tuple(
            place for place, (sequence, _, step) in enumerate(self.parts) if step.samples and sequence.constraint
        )

    def _searched(self) -> tuple[SearchedStep, ...]:
        if not self.searching:
            return ()
        return tuple(
            SearchedStep(place, sequence.beam.score, sequence.beam.keep)
            for place, (sequence, _, step) in enumerate(self.parts)
            if sequence.beam is not None and step.samples
        )
