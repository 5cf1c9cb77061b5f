"""Changes to one sequence's logits before sampling, each a small object. `processors_for` picks those that a request
needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from octavo.engine.plan import NewRow
from octavo.execute.transfer import to_device

NEVER = float("-inf")


class LogitsProcessor(Protocol):
    """Edits a row of logits in place, on the device, without waiting for it."""

    def apply(self, logits: torch.Tensor, history: torch.Tensor, length: int) -> None:
        """`logits` [V] float32; `history` int32, of which the first `length` entries are prompt and output so far."""


class AllowedTokens:
    def __init__(self, tokens: Sequence[int], vocab_size: int, device: torch.device) -> None:
        self.forbidden = torch.ones(vocab_size, dtype=torch.bool, device=device)
        self.forbidden.index_fill_(0, to_device(tokens, torch.int64, device), False)

    def apply(self, logits: torch.Tensor, history: torch.Tensor, length: int) -> None:
        logits.masked_fill_(self.forbidden, NEVER)


class BadWords:
    """Forbids the last token of a word where the tokens before it have just been made."""

    def __init__(self, words: Sequence[Sequence[int]], num_prompt: int, device: torch.device) -> None:
        self.num_prompt = num_prompt
        self.words = [(to_device(word[:-1], torch.int32, device), word[-1]) for word in words]

    def apply(self, logits: torch.Tensor, history: torch.Tensor, length: int) -> None:
        for before, last in self.words:
            begin = length - len(before)
            if begin >= self.num_prompt or len(before) == 0:
                made = (history[begin:length] == before).all()
                logits[last].masked_fill_(made, NEVER)


class MinTokens:
    """Forbids everything that would end the output, before it has so many tokens."""

    def __init__(self, stop_ids: Sequence[int], until: int, device: torch.device) -> None:
        self.until = until
        self.stop_ids = to_device(stop_ids, torch.int64, device)

    def apply(self, logits: torch.Tensor, history: torch.Tensor, length: int) -> None:
        if length < self.until:
            logits.index_fill_(0, self.stop_ids, NEVER)


class NoRepeatNGram:
    """Forbids what would complete a run of `size` tokens that stands in prompt or output already."""

    def __init__(self, size: int, vocab_size: int) -> None:
        self.size, self.vocab_size = size, vocab_size

    def apply(self, logits: torch.Tensor, history: torch.Tensor, length: int) -> None:
        if length < self.size:
            return
        runs = history[:length].unfold(0, self.size, 1)
        again = (runs[:, :-1] == history[length + 1 - self.size : length]).all(dim=1)
        nowhere = self.vocab_size  # one place more than there are tokens, for runs that begin otherwise
        forbidden = torch.zeros(nowhere + 1, dtype=torch.bool, device=logits.device)
        forbidden.index_fill_(0, torch.where(again, runs[:, -1].long(), nowhere), True)
        logits.masked_fill_(forbidden[:nowhere], NEVER)


class LogitBias:
    def __init__(self, bias: dict[int, float], device: torch.device) -> None:
        self.tokens = to_device(list(bias), torch.int64, device)
        self.values = to_device(list(bias.values()), torch.float32, device)

    def apply(self, logits: torch.Tensor, history: torch.Tensor, length: int) -> None:
        logits.index_add_(0, self.tokens, self.values.to(logits.dtype))


def processors_for(new: NewRow, vocab_size: int, device: torch.device) -> tuple[LogitsProcessor, ...]:
    """In the order in which they apply."""
    params = new.params
    found: list[LogitsProcessor] = []
    if params.allowed_token_ids is not None:
        found.append(AllowedTokens(params.allowed_token_ids, vocab_size, device))
    if new.bad_word_ids:
        found.append(BadWords(new.bad_word_ids, new.num_prompt, device))
    if params.no_repeat_ngram_size:
        found.append(NoRepeatNGram(params.no_repeat_ngram_size, vocab_size))
    if params.min_tokens and new.stop_ids:
        found.append(MinTokens(new.stop_ids, new.num_prompt + params.min_tokens, device))
    if params.logit_bias:
        found.append(LogitBias(dict(params.logit_bias), device))
    return tuple(found)
