"""The least time that a machine needs for a job: the limit beside a figure. Plain arithmetic, knows no torch.

A job is a sequence of steps. In a step every running request makes one token, and every request for which there is room
has its whole prompt computed. A step takes at least

    max(bytes that must be read / bandwidth, operations / rate of products)

- bytes: the layers' and the head's weights once; keys and values of every token that is attended to (prompt and what
  was made so far), once for a prefix that all requests share;
- operations: 2 for each parameter of the layers and each token, 2 for each parameter of the head and each token made,
  and `4 * heads * head_dim` a layer for each pair of a query and a key: a product of each with the other's kind, keys
  and values, a multiplication and an addition being two.

All else costs nothing here: norms, activations, sampling, the host. Nor does a limited token budget: prompts are
computed in one step. A prefix is computed once. A schedule that spreads a prompt over steps which only wait for memory
could hide some of its operations, which these steps do not; no schedule reads less or multiplies less.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from octavo.bench.workloads import Job


@dataclass(frozen=True, slots=True)
class Machine:
    """Bytes read a second, and operations a second in products."""

    bandwidth: float
    products: float


@dataclass(frozen=True, slots=True)
class ModelWork:
    """What a model asks of a machine."""

    weight_bytes: float
    """Read once a step: layers and head."""
    layer_parameters: int
    """Of all layers together."""
    head_parameters: int
    kv_bytes: float
    """Of one token's key and value in one layer."""
    pair_operations: int
    """Of one query with one key in one layer, over all heads."""
    windows: tuple[int, ...]
    """Keys that a query sees in each layer; 0: all."""


@dataclass(frozen=True, slots=True)
class Part:
    """A sequence in a step: `new` tokens are computed after `known` ones; one token comes out."""

    known: int
    new: int


@dataclass(frozen=True, slots=True)
class Need:
    """What a step asks for."""

    bytes: float
    operations: float

    def seconds(self, machine: Machine) -> float:
        return max(self.bytes / machine.bandwidth, self.operations / machine.products)


def step_need(model: ModelWork, parts: Sequence[Part], shared: int = 0) -> Need:
    """Of one step; the first `shared` tokens are the same in all parts."""
    tokens = sum(part.new for part in parts)
    size = model.weight_bytes
    operations = 2.0 * model.layer_parameters * tokens + 2.0 * model.head_parameters * len(parts)
    for window, layers in Counter(model.windows).items():
        seen = _shared_seen(parts, shared, window) + sum(_own_seen(part, shared, window) for part in parts)
        size += layers * model.kv_bytes * seen
        operations += layers * model.pair_operations * sum(_pairs(part, window) for part in parts)
    return Need(size, operations)


def least_seconds(model: ModelWork, machine: Machine, job: Job, at_once: int) -> float:
    """Of a whole job, with at most so many requests running; the others wait in order."""
    waiting = deque(zip(map(len, job.prompts), job.counts, strict=True))
    running: list[list[int]] = []  # [tokens known, tokens still to be made]
    prefix_known, seconds = 0, 0.0
    while waiting or running:
        parts = [Part(known, 1) for known, _ in running]
        while waiting and len(running) < at_once:
            prompt, count = waiting.popleft()
            parts.append(Part(prefix_known, prompt - prefix_known))
            running.append([prompt - 1, count])
            prefix_known = job.shared
        seconds += step_need(model, parts, job.shared).seconds(machine)
        for sequence in running:
            sequence[0] += 1
            sequence[1] -= 1
        running = [sequence for sequence in running if sequence[1] > 0]
    return seconds


def share(value: float, limit: float, unit: str) -> float:
    """How much of what is possible a figure reaches, 1 being all: of a rate more is better, of a time less."""
    return value / limit if unit.endswith("/s") else limit / value


def _own_seen(part: Part, shared: int, window: int) -> int:
    """Tokens of its own that are attended to, those computed now among them."""
    own = part.known + part.new - shared
    return min(own, window + part.new - 1) if window else own


def _shared_seen(parts: Iterable[Part], shared: int, window: int) -> int:
    """Tokens of the common prefix that any part attends to."""
    if not window:
        return shared
    first = min(max(0, part.known - window + 1) for part in parts)
    return max(0, shared - first)


def _pairs(part: Part, window: int) -> int:
    """Pairs of a query and a key: the query at position p sees p + 1 keys, at most `window`."""
    low, high = part.known + 1, part.known + part.new
    if not window or high <= window:
        return (low + high) * part.new // 2
    below = max(0, window - low + 1)  # queries that see fewer keys than the window has
    return below * (2 * low + below - 1) // 2 + (part.new - below) * window
