"""Steps that are recorded once and replayed: a few calls to the device instead of some hundreds.

Two kinds. *Forward* graphs, one for each padded number of tokens and of sequences: new blocks are entered, inputs
looked up, the model runs, broken sequences are found. *Draw* graphs, one for each padded number of tokens to draw:
logits, sampling, and the tokens noted where the next step reads them. A step takes the smallest that fits; one that
fits none runs the same operators one by one. On a GPU a recording is a CUDA graph, elsewhere a function that is called
again, so that everything here but the capture itself runs on any machine.

Called by `graphed_runner.py`. Why graphs: on the host that was measured an operator costs 37 us, a replay 7 to 43.
"""

from __future__ import annotations

import gc
import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from octavo_kernels import draw_tokens, enter_blocks, find_broken, step_inputs
from octavo_kernels.ahead import compiled_ahead

from octavo.attention.base import AttentionBackend
from octavo.engine.plan import RowStep, StepPlan
from octavo.execute.context import ForwardContext, KVCache, StepInputs
from octavo.execute.model import Model
from octavo.execute.rehearsal import choose_in_every_way
from octavo.execute.staging import Staging
from octavo.execute.table import FLOATS, RowTable
from octavo.host_memory import collector_paused

SHARING = 8
"""Sequences from which on a common prefix is attended to by all at once."""
FEW, FEW_TOKENS = 8, 512
"""Sequences of the graphs for prompts that come alone or nearly so, and up to how many tokens there are such."""
SOME_TOKENS = (16, 128, 1024)
"""Of steps with prompts in them: tiles of kernels differ between these, and not beyond."""
Replay = Callable[[], None]


class Recorder(Protocol):
    """Makes a function out of what another one does."""

    def prepare(self, function: Callable[[], None], meanwhile: Callable[[], None]) -> None:
        """Run `function` once, so that nothing is left to be compiled when it is recorded; and something else."""

    def __call__(self, function: Callable[[], None]) -> Replay: ...


def sizes_up_to(most: int) -> list[int]:
    """Of decoding steps: padding costs little, so few graphs for few rows, then one for every 8, 16 and 32."""
    return sorted({size for size in (1, 2, 4, 8, 16, 24, 32, 48, *range(64, most, 32), most) if size <= most})


def sharing_sizes_up_to(most: int) -> list[int]:
    """Of those with a common prefix: one for every 32."""
    return sorted({size for size in (SHARING, 16, *range(32, most, 32), most) if SHARING <= size <= most})


def token_sizes_up_to(most: int) -> list[int]:
    """Of steps with prompts in them: from 16 tokens on at most a half is padding, from 256 on a fifth."""
    sizes = [16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024]
    sizes += [1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, *range(5120, 8192, 1024), *range(8192, most, 2048), most]
    return sorted({size for size in sizes if size <= most})


_FREE_STREAMS: dict[int, list[torch.cuda.Stream]] = {}
"""By device: those on which closed engines recorded. cuBLAS has a workspace for each stream that a product was recorded
on (32 MiB on an H100), in the memory of the graph and for good: with new streams for each engine 32 of them stay, as
many as torch has streams. But no two living engines share one: graphs use the workspace of their stream, and newer
versions of torch free it with any graph of that stream."""


class CudaRecorder:
    """Captures into one pool of memory: graphs run one at a time, so they may use the same."""

    def __init__(self) -> None:
        free = _FREE_STREAMS.setdefault(torch.cuda.current_device(), [])
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = free.pop() if free else torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graphs: list[torch.cuda.CUDAGraph] = []
        weakref.finalize(self, _give_up, self._graphs, self._stream, free).atexit = False

    def prepare(self, function: Callable[[], None], meanwhile: Callable[[], None]) -> None:
        with compiled_ahead(meanwhile):
            function()
        function()

    def __call__(self, function: Callable[[], None]) -> Replay:
        # not torch.cuda.graph, which collects garbage and empties the allocator's cache before every capture
        graph = torch.cuda.CUDAGraph()
        self._graphs.append(graph)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        return graph.replay


def _give_up(graphs: list[torch.cuda.CUDAGraph], stream: torch.cuda.Stream, free: list[torch.cuda.Stream]) -> None:
    """The engine is gone: its graphs go before another one may record on their stream."""
    for graph in graphs:
        graph.reset()
    free.append(stream)


class CallAgain:
    """The recorder of devices without graphs."""

    def prepare(self, function: Callable[[], None], meanwhile: Callable[[], None]) -> None:
        meanwhile()
        function()

    def __call__(self, function: Callable[[], None]) -> Replay:
        return function


@dataclass(frozen=True, slots=True)
class Shape:
    tokens: int
    entries: int
    decoding: bool
    """Every sequence has one token."""
    whole_prompt: bool = False
    """It is one prompt, of which nothing was computed before."""
    sharing: bool = False
    """They begin with the same blocks, enough of them to be attended to at once."""
    undivided: bool = False
    """None of them is longer than what attention does in one piece."""


class StepGraphs:
    """`max_tokens`: the most that a step has."""

    def __init__(
        self, model: Model, kv: KVCache, table: RowTable, attention: AttentionBackend, *, max_tokens: int, hidden: int,
        dtype: torch.dtype, recorder: Recorder,
    ) -> None:  # fmt: skip
        self._model, self._kv, self._table, self._attention, self._record = model, kv, table, attention, recorder
        rows = len(table.sampling)
        self.staging = Staging(rows, rows + max_tokens // table.block_size, table.device)
        self._decode_sizes = sizes_up_to(rows)
        self._sharing_sizes = sharing_sizes_up_to(rows) if attention.shares_prefixes else []
        self._token_sizes = token_sizes_up_to(max_tokens)
        self._entry_sizes = sorted({min(FEW, rows), rows})
        self._max_tokens = max_tokens
        self._prompt_sizes: list[int] = []
        self.hidden = torch.zeros(max_tokens, hidden, dtype=dtype, device=table.device)
        """[tokens, hidden], final states of the step that ran last."""
        self._inputs = torch.zeros(3, max_tokens, dtype=torch.int64, device=table.device)
        self._forward: dict[Shape, Replay] = {}
        self._draw: dict[int, Replay] = {}

    def shapes(self) -> list[Shape]:
        """Of all forward graphs, the largest first, so that the smaller ones find their memory in the pool."""
        decoding = [Shape(size, size, True) for size in self._decode_sizes]
        decoding += [Shape(size, size, True, sharing=True) for size in self._sharing_sizes]
        decoding += [Shape(s, s, True, undivided=True) for s in self._decode_sizes if self._undivided(s) > 0]
        mixed = [Shape(t, e, False) for t in self._token_sizes for e in self._entry_sizes_of(t)]
        prompts = [Shape(size, 1, False, whole_prompt=True) for size in self._prompt_sizes]
        return sorted(decoding + mixed + prompts, key=lambda shape: (-shape.tokens, -shape.entries))

    @torch.inference_mode()
    def capture(self) -> None:
        """Record everything. Kernels that a step needs are compiled before the first recording."""
        examples, longest, own = _examples(self.shapes()), self._max_tokens, self._attention.longest_own

        def every_kind() -> None:
            for shape in examples:
                self._run(shape)
                self._draw_some(shape.entries)
            choose_in_every_way(self._table)

        self._record.prepare(every_kind, meanwhile=lambda: self._attention.get_ready(longest))
        if (step := self._attention.prompt_step) and (sizes := range(own + step, longest + 1, step)):
            self._prompt_sizes = list(sizes)
            self._run(Shape(sizes[0], 1, False, whole_prompt=True))
        shapes = self.shapes()
        with collector_paused():  # a collection during a capture might free memory that belongs to it
            for shape in shapes:
                self._forward[shape] = self._record(partial(self._run, shape))
            for size in reversed(self._decode_sizes):
                self._draw[size] = self._record(partial(self._draw_some, size))
        gc.collect()  # all that a start made is looked through now (0.08 s), or it would be amid the first requests

    # ---------------------------------------------------------------- each step

    def fits(self, plan: StepPlan) -> bool:
        """A step that enters more blocks than there is room for (found in the cache) must have them entered before."""
        return len(plan.new_blocks) <= self.staging.blocks

    def forward(self, plan: StepPlan, drawing: Sequence[int]) -> torch.Tensor:
        """Launch a step; the entries at `drawing` can then `draw`. [tokens, hidden]."""
        longest = max(step.start + step.count for step in plan.steps)
        parts = self._shared_parts(plan, longest)
        shape = self._shape_for(plan, parts, longest)
        self.staging.send(plan, shape.entries, drawing, _smallest(self._decode_sizes, len(drawing)) or 0, parts)
        replay = self._forward.get(shape)
        if replay is not None:
            replay()
        else:
            self._run(shape, plan)
        return self.hidden[: plan.num_tokens]

    def _shared_parts(self, plan: StepPlan, longest: int) -> int:
        if plan.shared_blocks == 0 or len(plan.steps) < SHARING or not self._sharing_sizes:
            return 0
        return self._attention.shared_parts(plan.shared_blocks * self._table.block_size, longest)

    def _shape_for(self, plan: StepPlan, shared_parts: int, longest: int) -> Shape:
        """Of the graph for a step; its own where there is none."""
        size, tokens = len(plan.steps), plan.num_tokens
        if tokens == size:
            sharing = shared_parts > 0
            padded = _smallest(self._sharing_sizes if sharing else self._decode_sizes, size) or size
            undivided = not sharing and longest <= self._undivided(padded)
            return Shape(padded, padded, True, sharing=sharing, undivided=undivided)
        if self._prompt_sizes and any(s.start == 0 and s.count > self._attention.longest_own for s in plan.steps):
            longer = _smallest(self._prompt_sizes, tokens) if size == 1 else None
            return Shape(longer or tokens, size, False, whole_prompt=longer is not None)
        padded = _smallest(self._token_sizes, tokens) or tokens
        return Shape(padded, _smallest(self._entry_sizes_of(padded), size) or size, False)

    def _undivided(self, entries: int) -> int:
        return min(self._attention.undivided(entries), self._table.tokens.shape[1])

    def _entry_sizes_of(self, tokens: int) -> list[int]:
        return self._entry_sizes if tokens <= FEW_TOKENS else self._entry_sizes[-1:]

    def draw(self, count: int) -> None:
        """Draw the `count` tokens that were announced to `forward`."""
        self._draw[_smallest(self._decode_sizes, count) or 0]()

    # ---------------------------------------------------------------- what is recorded

    def _run(self, shape: Shape, plan: StepPlan | None = None) -> None:
        """`plan`: of a step that is not recorded."""
        steps = [RowStep(0, 0, shape.tokens, True)] if shape.whole_prompt else plan.steps if plan else []
        staging, table, entries = self.staging, self._table, shape.entries
        updates = (staging.part(name, staging.blocks) for name in ("block_rows", "block_columns", "blocks"))
        enter_blocks(table.block_table, *updates)
        rows, starts, lengths = (staging.part(name, entries) for name in ("rows", "starts", "lengths"))
        query_start = staging.part("query_start", entries + 1)
        ids, positions, slots = self._inputs[:, : shape.tokens]
        step_inputs(
            rows, starts, query_start, table.tokens, table.block_table, table.block_size, total=shape.tokens,
            out=(ids, positions, slots),
        )  # fmt: skip
        inputs = StepInputs(
            ids, positions, slots, rows, query_start, lengths, table.block_table, table.block_size,
            host_rows=[step.row for step in steps], counts=[step.count for step in steps],
            lengths=[step.start + step.count for step in steps], num_decodes=entries if shape.decoding else 0,
            max_query_len=1 if shape.decoding else shape.tokens,
            max_seq_len=self._undivided(entries) if shape.undivided else table.tokens.shape[1],
            shared_parts=staging.part("shared_parts", 1) if shape.sharing else None,
        )  # fmt: skip
        hidden = self.hidden[: shape.tokens]
        hidden.copy_(self._model.forward(ForwardContext(inputs, self._attention.prepare(inputs), self._kv)))
        find_broken(hidden, query_start, staging.results[1, :entries])

    def _draw_some(self, size: int) -> None:
        staging, table = self.staging, self._table
        rows, positions, chosen = (staging.part(f"drawn_{name}", size) for name in ("rows", "positions", "tokens"))
        logits = self._model.logits(self.hidden.index_select(0, chosen))
        temperature = table.floats[:, FLOATS.index("temperature")]
        draw_tokens(logits, rows, positions, temperature, table.seeds, table.tokens, staging.results[0, :size])


def _examples(shapes: Sequence[Shape]) -> list[Shape]:
    """Of shapes, largest first, some that have every kernel in them, and take little time: all of 8192 tokens of an 8B
    model would take half a second."""
    decoding = {replace(shape, tokens=0, entries=0): shape for shape in reversed(shapes) if shape.decoding}
    alike = {shape.tokens: shape for shape in shapes if not shape.decoding}
    few = [Shape(size, size, True) for size in (1, FEW) if Shape(size, size, True) in shapes]
    some = {min((tokens for tokens in alike if tokens >= wanted), default=max(alike, default=0))
            for wanted in SOME_TOKENS}  # fmt: skip
    return [*decoding.values(), *few, *(alike[tokens] for tokens in some if tokens)]


def _smallest(sizes: list[int], wanted: int) -> int | None:
    """The smallest of `sizes` (in order) that is not below `wanted`."""
    at = bisect_left(sizes, wanted)
    return sizes[at] if at < len(sizes) else None
