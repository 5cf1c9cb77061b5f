"""How fast are sentences translated on this machine's CPU, beside transformers and CTranslate2? Prints a table.

    python benchmarks/translate.py [--rounds 3] [--layers 2] [--engines octavo-bf16 ...] [--out results.json]

A model of the shape of nllb-200-distilled-600M with random weights, made once by transformers, 32 sentences of 10 to
40 tokens, beam search with 4 beams, 24 new tokens each: none may end before, so all engines make equally many. Each
engine runs in a process of its own in every round, all once a round one after another, so that what else the machine
does hits all of them. In a process one batch of other sentences goes first and is not counted; no sentence is ever
given twice, or caches would flatter. The median of the rounds counts.

The limit beside the figures: each product takes at least its operations over the rate of one large product of the same
type, each step at least the bytes of its weights over the bandwidth, both measured by `octavo.bench`. CTranslate2
comes from PyPI (`pip install ctranslate2`); an engine that cannot be imported is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute().parent
# an engine that imports `kernels` shall not find kernels.py here
sys.path[:] = [place for place in sys.path if Path(place).absolute() != HERE]

VOCABULARY, HIDDEN, INNER, HEADS, LAYERS = 256206, 1024, 4096, 16, 12
START, PAD, END = 0, 1, 2
SENTENCES, SHORTEST, LONGEST, BEAMS, NEW = 32, 10, 40, 4, 24


def sentences(seed: int) -> list[list[int]]:
    """Token ids that end as a source does."""
    rng = random.Random(seed)
    lengths = [rng.randint(SHORTEST, LONGEST) for _ in range(SENTENCES)]
    return [[rng.randrange(300, VOCABULARY) for _ in range(length - 1)] + [END] for length in lengths]


class Octavo:
    def __init__(self, folder: Path, dtype: str) -> None:
        from octavo import LLM, SamplingParams

        kind = {"quantization": dtype} if dtype == "int8" else {"dtype": dtype}
        self.llm = LLM(str(folder / "model"), **kind)
        self.params = SamplingParams(
            use_beam_search=True, beam_width=BEAMS, max_tokens=NEW, ignore_eos=True, detokenize=False
        )

    def translate(self, sources: list[list[int]]) -> list[list[int]]:
        prompts = [{"prompt_token_ids": ids, "decoder_prompt_token_ids": [START]} for ids in sources]
        return [list(output.outputs[0].token_ids) for output in self.llm.generate(prompts, self.params)]


class Transformers:
    """All sentences as one batch, in the order of their length."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForSeq2SeqLM

        self.torch = torch
        path = folder / "model"
        self.model = AutoModelForSeq2SeqLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        self.model.generation_config.eos_token_id = None  # nothing to forbid in each step

    def translate(self, sources: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, sources))
        with self.torch.inference_mode():
            made = self.model.generate(
                input_ids=self.torch.tensor([ids + [PAD] * (longest - len(ids)) for ids in sources]),
                attention_mask=self.torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i in sources]),
                num_beams=BEAMS, do_sample=False, max_new_tokens=NEW, pad_token_id=PAD, decoder_start_token_id=START,
            )  # fmt: skip
        return made[:, 1:].tolist()


class CTranslate2:
    def __init__(self, folder: Path, dtype: str) -> None:
        import ctranslate2

        place = folder / "ctranslate2"
        cores = len(os.sched_getaffinity(0))
        self.translator = ctranslate2.Translator(
            str(place), device="cpu", compute_type=dtype, inter_threads=1, intra_threads=cores
        )

    def translate(self, sources: list[list[int]]) -> list[list[int]]:
        results = self.translator.translate_batch(
            [[token_name(token) for token in ids] for ids in sources], beam_size=BEAMS, max_batch_size=SENTENCES,
            min_decoding_length=NEW, max_decoding_length=NEW,
        )  # fmt: skip
        return [[token_number(name) for name in result.hypotheses[0]] for result in results]


ENGINES: dict[str, tuple[type[Any], str, str]] = {
    "octavo-bf16": (Octavo, "octavo", "bfloat16"),
    "octavo-int8": (Octavo, "octavo", "int8"),
    "octavo-f32": (Octavo, "octavo", "float32"),
    "transformers-bf16": (Transformers, "transformers", "bfloat16"),
    "transformers-f32": (Transformers, "transformers", "float32"),
    "ctranslate2-f32": (CTranslate2, "ctranslate2", "float32"),
    "ctranslate2-int8": (CTranslate2, "ctranslate2", "int8"),
}
"""Class, module and type."""
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def token_name(token: int) -> str:
    return SPECIAL[token] if token < len(SPECIAL) else f"t{token}"


def token_number(name: str) -> int:
    return SPECIAL.index(name) if name in SPECIAL else int(name[1:])


def make_model(folder: Path, layers: int) -> None:
    """Random weights in float32 for all, and the same converted for CTranslate2."""
    import torch
    from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizer

    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=INNER,
        decoder_ffn_dim=INNER, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, scale_embedding=True,
        decoder_start_token_id=START,
    )  # fmt: skip
    model = M2M100ForConditionalGeneration(config).eval()
    model.save_pretrained(folder / "model")
    # a few words are enough: only Octavo reads them, and it is given token ids
    words = {word: number for number, word in enumerate([*SPECIAL, "▁a"])}
    NllbTokenizer(vocab=words, merges=[]).save_pretrained(folder / "model")
    if find_spec("ctranslate2") is None:
        return
    from ctranslate2.converters.transformers import M2M100Loader

    with torch.no_grad():
        spec = M2M100Loader().get_model_spec(model)
    names = [token_name(token) for token in range(VOCABULARY)]
    spec.register_source_vocabulary(names)
    spec.register_target_vocabulary(names)
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "<s>", "</s>", "<unk>"
    spec.config.decoder_start_token = "<s>"
    spec.validate()
    spec.optimize()
    (folder / "ctranslate2").mkdir(parents=True)
    spec.save(str(folder / "ctranslate2"))


def run_engine(name: str, folder: Path, seed: int) -> dict[str, Any]:
    """In this process."""
    made_by, _, dtype = ENGINES[name]
    engine = made_by(folder, dtype)
    engine.translate(sorted(sentences(2 * seed), key=len))
    sources = sorted(sentences(2 * seed + 1), key=len)
    began, used = time.perf_counter(), time.process_time()
    outputs = engine.translate(sources)
    seconds, cores = time.perf_counter() - began, time.process_time() - used
    if [len(tokens) for tokens in outputs] != [NEW] * SENTENCES:
        raise RuntimeError(f"{name} made {sorted(set(map(len, outputs)))} tokens for a sentence, not {NEW}")
    return {"seconds": seconds, "cpu_seconds": cores, "outputs": outputs}


def least_seconds(layers: int) -> dict[str, float]:
    """By type, what products and memory allow. The encoder sees each token once, the decoder each beam's."""
    import torch
    from octavo.bench.machine import measure_bandwidth, measure_products

    cpu, square = torch.device("cpu"), HIDDEN * HIDDEN
    ffn, head = 2 * HIDDEN * INNER, HIDDEN * VOCABULARY
    source_tokens = SENTENCES * (SHORTEST + LONGEST) / 2
    source_weights, step_weights = layers * (4 * square + ffn + 2 * square), layers * (6 * square + ffn) + head
    rows = SENTENCES * (1 + (NEW - 1) * BEAMS)  # the first step has one beam
    operations = 2 * (source_tokens * source_weights + rows * step_weights)
    bandwidth, found = measure_bandwidth(cpu), {}
    for dtype, kind in {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}.items():
        moved = (source_weights + NEW * step_weights) * kind.itemsize
        found[dtype] = max(operations / measure_products(cpu, kind), moved / bandwidth)
    return found


def agreement(outputs: list[list[int]], others: list[list[int]]) -> float:
    """Share of the sentences that are equal."""
    return sum(mine == other for mine, other in zip(outputs, others, strict=True)) / len(outputs)


def show(runs: dict[str, list[dict[str, Any]]], limits: dict[str, float]) -> None:
    print(f"\n| {'':17} | seconds | of the rounds | sentences/s | cpu s | limit, s | as {'first':>5} |")
    print("|---|---:|---|---:|---:|---:|---:|")
    first = next(iter(runs.values()))
    for name, rounds in runs.items():
        seconds = [run["seconds"] for run in rounds]
        median = statistics.median(seconds)
        cpu = statistics.median(run["cpu_seconds"] for run in rounds)
        same = statistics.mean(agreement(a["outputs"], b["outputs"]) for a, b in zip(rounds, first, strict=True))
        spread = f"{min(seconds):.2f}..{max(seconds):.2f}"
        print(
            f"| {name:17} | {median:7.2f} | {spread:>13} | {SENTENCES / median:11.2f} | {cpu:5.1f} | "
            f"{limits[ENGINES[name][2]]:8.2f} | {same:7.0%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--layers", type=int, default=LAYERS, help="of encoder and decoder, each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the models are kept (default: a folder of temp)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", metavar="ENGINE", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    work = given.work or Path(tempfile.gettempdir()) / "octavo-translate"
    folder = work / f"layers-{given.layers}"
    if given.one:
        print("\n" + json.dumps(run_engine(given.one, folder, given.seed)), flush=True)
        os._exit(0)  # what an engine does when its process ends is not measured
    if not (folder / "model" / "config.json").is_file():
        make_model(folder, given.layers)
    names = [name for name in given.engines if find_spec(ENGINES[name][1]) is not None]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(given.rounds):
        for name in names:
            command = [sys.executable, __file__, "--one", name, "--work", str(work), "--layers", str(given.layers)]
            done = subprocess.run([*command, "--seed", str(number)], stdout=subprocess.PIPE, check=True, text=True)
            run = json.loads(done.stdout.strip().splitlines()[-1])
            run["load"] = os.getloadavg()[0]
            runs[name].append(run)
            figures = f"{run['seconds']:.2f} s, {run['cpu_seconds']:.1f} s of the cores, load {run['load']:.1f}"
            print(f"round {number + 1} {name}: {figures}", flush=True)
    limits = least_seconds(given.layers)
    show(runs, limits)
    if given.out:
        given.out.write_text(json.dumps({"layers": given.layers, "limits": limits, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
