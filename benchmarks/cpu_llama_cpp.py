"""llama.cpp for `cpu.py`, in two ways: through the class `Llama` of llama-cpp-python, one request after another, and
with all requests in one batch through the functions of llama.cpp itself, which `Llama` does not do."""

from __future__ import annotations

from typing import Any

CONTEXT = 2048


class LlamaOneByOne:
    prefix_cache = False  # `Llama` keeps one context: it finds the prefix of the request before within a call too

    def __init__(self, model: str, threads: int = 2, flash: bool = True) -> None:
        from llama_cpp import Llama

        self.llama = Llama(
            model, n_ctx=CONTEXT, n_batch=1024, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
            flash_attn=flash, verbose=False,
        )  # fmt: skip

    def generate(self, prompts: list[list[int]], counts: list[int], shared: int = 0) -> int:
        made = 0
        for ids, count in zip(prompts, counts, strict=True):
            for number, _ in enumerate(self.llama.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0), 1):
                if number == count:
                    break
            made += number
        return made


class LlamaBatched:
    """Each request is a sequence of one context; prompts go in one by one, then every step adds a token to each.

    The context is made anew for each call with as many sequences as it has requests: cells of a sequence that is not
    there would be read all the same."""

    prefix_cache = False

    def __init__(self, model: str, threads: int = 2, flash: bool = True, unified: bool = False) -> None:
        import llama_cpp
        import numpy

        self.c, self.numpy = llama_cpp, numpy
        self.threads, self.flash, self.unified = threads, flash, unified
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(CONTEXT, 0, 1)
        self.contexts: dict[tuple[int, int], Any] = {}

    def context(self, sequences: int, length: int, total: int) -> Any:
        params = self.c.llama_context_default_params()
        cells = total if self.unified else sequences * (-(-length // 256) * 256)
        params.n_ctx, params.n_seq_max, params.kv_unified = max(cells, 512), sequences, self.unified
        params.n_batch, params.n_ubatch = CONTEXT, 512
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = int(self.flash)
        key = (params.n_ctx, sequences)
        if key not in self.contexts:
            for old in self.contexts.values():
                self.c.llama_free(old)
            self.contexts = {key: self.c.llama_init_from_model(self.model, params)}
        self.c.llama_memory_clear(self.c.llama_get_memory(self.contexts[key]), False)
        return self.contexts[key]

    def decode(self, context: Any, items: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run (token, position, sequence, wanted) and return the most likely next token of each that is wanted."""
        batch = self.batch
        batch.n_tokens = len(items)
        for place, (token, position, sequence, wanted) in enumerate(items):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = wanted
        if self.c.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        wanted_rows = sum(wanted for *_, wanted in items)
        if not wanted_rows:
            return []
        rows = [self.c.llama_get_logits_ith(context, place) for place, item in enumerate(items) if item[3]]
        view = self.numpy.ctypeslib.as_array
        return [int(view(row, (self.vocabulary,)).argmax()) for row in rows]

    def generate(self, prompts: list[list[int]], counts: list[int], shared: int = 0) -> int:
        lengths = [len(ids) + count for ids, count in zip(prompts, counts, strict=True)]
        context = self.context(len(prompts), max(lengths), sum(lengths))
        memory = self.c.llama_get_memory(context)
        last, made = [0] * len(prompts), 0
        if shared:
            self.decode(context, [(token, place, 0, False) for place, token in enumerate(prompts[0][:shared])])
            for sequence in range(1, len(prompts)):
                self.c.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        for sequence, ids in enumerate(prompts):
            own = range(shared, len(ids))
            last[sequence] = self.decode(context, [(ids[p], p, sequence, p == own[-1]) for p in own])[0]
            made += 1
        for step in range(1, max(counts)):
            active = [sequence for sequence, count in enumerate(counts) if count > step]
            items = [(last[s], len(prompts[s]) + step - 1, s, True) for s in active]
            for sequence, token in zip(active, self.decode(context, items), strict=True):
                last[sequence] = token
            made += len(active)
        return made
