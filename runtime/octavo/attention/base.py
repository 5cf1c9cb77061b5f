"""What an attention back end is. The runner asks it to `prepare` once a step; every layer then calls `attend` on the
result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from octavo.execute.context import StepInputs


class PreparedAttention(ABC):
    """One step's attention: everything that is the same for all layers is already computed."""

    @abstractmethod
    def attend(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *, scale: float, window: int,
        kv_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Causal attention of the step's queries `[T, H, D]` over the cached keys and values `[blocks, KH, slot, D]`,
        in which this step's own are written already. `window` > 0: only keys less than so many positions back.
        `kv_scales`: of an FP8 cache (see `KVCache`), which only a GPU's back end is given. `[T, H, D]`."""


class AttentionBackend(ABC):
    """How attention is computed on one kind of device."""

    default_block_size: int
    row_multiple: int = 1
    """Steps are padded to a multiple of so many tokens, where the products would otherwise depend on the batch."""

    most_recorded: int = 4096
    """Steps of more tokens are not recorded as graphs: for them `prepare` is given the counts of the host."""
    prompt_step: int | None = None
    """But a longer prompt that comes whole and alone is, rounded up to a multiple of this; None: it is not."""

    def shared_parts(self, shared: int, longest: int) -> int:
        """In how many parts the first `shared` tokens, the same blocks in all sequences of a decoding step of up to
        `longest` tokens each, are better attended to together; 0: it makes no difference here."""
        return 0

    @abstractmethod
    def prepare(self, inputs: StepInputs) -> PreparedAttention: ...
