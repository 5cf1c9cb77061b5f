"""Files that `cpu.py` makes for the peers out of the measured GGUF file; runs in the interpreter of whoever can.

    python benchmarks/cpu_files.py WHAT SOURCE TARGET [KIND]

WHAT is requantise (to KIND, by llama.cpp) or dequantise (to bfloat16, by transformers).
"""

from __future__ import annotations

import sys
from pathlib import Path


def requantise(source: Path, target: Path, kind: str) -> None:
    """Another 4- or 8-bit format, by llama.cpp itself: it runs some formats with quicker code than others."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}[kind]
    params.allow_requantize, params.nthread = True, 2
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise SystemExit(f"{source} cannot be written as {kind}")


def dequantise(source: Path, target: Path) -> None:
    """A Hugging Face folder in bfloat16, for engines that read no GGUF file or are slow with one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # the weights are not packed any more, and save_pretrained would think so
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def main() -> None:
    what, source, target, *rest = sys.argv[1:]
    made, part = Path(target), Path(target + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    requantise(Path(source), part, *rest) if what == "requantise" else dequantise(Path(source), part)
    part.rename(made)  # a file that was interrupted is not taken for a whole one


if __name__ == "__main__":
    main()
