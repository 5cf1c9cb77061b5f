"""What an attention back end is. The runner asks it to `prepare` once a step; every layer then calls `attend` on the
result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from octavo.execute.context import StepInputs


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, each `[num_blocks, KH, block_size, D]`."""

    keys: torch.Tensor
    values: torch.Tensor
    scales: torch.Tensor | None = None
    """`[2, KH]` fp32, where they are FP8: what keys and values are to be multiplied with."""


class PreparedAttention(ABC):
    """One step's attention: everything that is the same for all layers is already computed."""

    @abstractmethod
    def attend(
        self, q: torch.Tensor, cache: LayerCache, *, scale: float, window: int,
        distance_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Causal attention of the step's queries `[T, H, D]` over cached keys and values, in which this step's own are
        written already. `window` > 0: only keys less than so many positions back. `distance_bias` `[H, N]`: what is
        added to the score of a key that lies so many tokens back, N - 1 or more alike. `[T, H, D]`."""


class AttentionBackend(ABC):
    """How attention is computed on one kind of device."""

    default_block_size: int
    longest_own: int = 4096
    """Longer prompts that come whole may go to a library, which must be told their lengths: steps with such a prompt
    are not replayed, as `prepare` is given the counts of the host then."""
    prompt_step: int | None = None
    """But one that comes alone is replayed, rounded up to a multiple of this; None: there is no library."""
    shares_prefixes: bool = False
    """Decoding sequences that begin with the same blocks can attend to them at once (see `shared_parts`)."""

    def padded(self, rows: int) -> int:
        """To how many tokens a step of so many is padded, and to how many rows one that draws so many."""
        return rows

    def undivided(self, sequences: int) -> int:
        """Steps that decode so many sequences, none of more tokens than this, are worth graphs of their own; 0: it
        makes no difference here."""
        return 0

    def shared_parts(self, shared: int, longest: int) -> int:
        """In how many parts the first `shared` tokens, the same blocks in all sequences of a decoding step of up to
        `longest` tokens each, are better attended to together; 0: it makes no difference here."""
        return 0

    def get_ready(self, max_tokens: int) -> None:
        """Called once, before steps of up to so many tokens are recorded. Sets `prompt_step`; may take seconds, outside
        of Python."""
        self.prompt_step = None

    @abstractmethod
    def prepare(self, inputs: StepInputs) -> PreparedAttention: ...

    def prepare_cross(self, inputs: StepInputs, sources: Sequence[int]) -> PreparedAttention:
        """Attention to sources: every token of the step is a sequence of one query at the end of its source, `lengths`
        are those of the sources. Tokens with equal `sources` have the same one."""
        return self.prepare(inputs)
