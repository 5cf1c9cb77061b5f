"""How one running sequence's tokens are chosen: its parameters, made ready on the device once, when it gets its row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.decode.processors import LogitsProcessor, processors_for
from octavo.engine.plan import NewRow


@dataclass(frozen=True, slots=True)
class RowSampling:
    num_prompt: int
    greedy: bool
    filtered: bool
    """top-k, top-p or min-p is on."""
    penalised: bool
    logprobs: int | None
    """Alternatives to report besides the chosen token; None: no log-probabilities."""
    processors: tuple[LogitsProcessor, ...]

    @classmethod
    def of(cls, new: NewRow, vocab_size: int, device: torch.device) -> RowSampling:
        params = new.params
        return cls(
            num_prompt=new.num_prompt,
            greedy=params.greedy,
            filtered=not params.greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0),
            penalised=(params.presence_penalty, params.frequency_penalty, params.repetition_penalty) != (0, 0, 1),
            logprobs=(params.logprobs or 0) if new.wants_logprobs else None,
            processors=processors_for(new, vocab_size, device),
        )

    @property
    def plain(self) -> bool:
        """The raw logits decide: no processor, no penalty."""
        return not self.processors and not self.penalised
