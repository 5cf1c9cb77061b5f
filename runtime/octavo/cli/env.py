"""`octavo env`: what a bug report needs to know about this machine, and nothing that should stay private."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.cli.options import Debug, Json
from octavo.cli.screen import size

PACKAGES = (
    "octavo", "torch", "triton", "transformers", "tokenizers", "huggingface-hub", "safetensors", "gguf", "numpy",
)  # fmt: skip
FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd",
    "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip
VARIABLES = (
    "OCTAVO_CACHE", "OCTAVO_MODEL", "OCTAVO_USE_MODELSCOPE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT",
    "HF_TOKEN", "HTTPS_PROXY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LD_PRELOAD",
)  # fmt: skip
OPEN_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")
"""Of these the value is shown; of the others only that they are set."""


def env(as_json: Json = False, debug: Debug = False) -> None:
    """A report on this machine, to paste into a bug report.

    Versions, processor, memory, GPUs, caches and their models. No secrets: of variables that may hold one it says only
    that they are set, and the home folder is written as ~.
    """
    report = collect()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for line in _lines(report):
        print(line)


def collect() -> dict[str, Any]:
    """The report as data."""
    import torch
    from octavo_kernels.cpu.processor import cpu_flags, cpu_name

    from octavo.execute.build import cpu_multiplies_bfloat16
    from octavo.host import free_memory, system_memory, usable_cores
    from octavo.models.cache import cache_dir, hf_cache_dir, list_cached

    free, total = free_memory()
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append({
            "name": properties.name,
            "bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
        })  # fmt: skip
    packages = {name: _version(name) for name in PACKAGES} | {"torch": str(torch.__version__)}  # tells the build: +cpu
    return {
        "versions": {"python": platform.python_version(), **packages},
        "python": _tilde(sys.executable),
        "system": f"{platform.system()} {platform.release()} {platform.machine()} {' '.join(platform.libc_ver())}",
        "cpu": {
            "model": cpu_name() or platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "usable": usable_cores(), "threads": min(torch.get_num_threads(), usable_cores()),
            "flags": [flag for flag in FLAGS if flag in cpu_flags()],
            "multiplies_bfloat16": cpu_multiplies_bfloat16(),
        },
        "ram": {"bytes": system_memory()[1], "usable": total, "free": free},
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "caches": {"octavo": _tilde(cache_dir()), "huggingface": _tilde(hf_cache_dir())},
        "models": [{"name": m.name, "source": m.source, "bytes": m.size_bytes} for m in list_cached()],
        "variables": {
            name: os.environ[name] if name in OPEN_VARIABLES else "set" for name in VARIABLES if os.environ.get(name)
        },
    }  # fmt: skip


def _lines(report: dict[str, Any]) -> Iterator[str]:
    for name, version in report["versions"].items():
        yield f"{name + ':':<20}{version}"
    cpu = report["cpu"]
    native = "native" if cpu["multiplies_bfloat16"] else "emulated, so float32 is used"
    yield f"{'interpreter:':<20}{report['python']}"
    yield f"{'system:':<20}{report['system']}"
    yield f"{'cpu:':<20}{cpu['model']}, {cpu['cores']} cores ({cpu['usable']} usable, {cpu['threads']} threads)"
    yield f"{'cpu flags:':<20}{' '.join(cpu['flags']) or 'none of those that matter'}"
    yield f"{'bfloat16:':<20}{native}"
    ram = {name: size(count) for name, count in report["ram"].items()}
    yield f"{'ram:':<20}{ram['bytes']} ({ram['usable']} usable, {ram['free']} of it free)"
    for gpu in report["gpus"]:
        yield f"{'gpu:':<20}{gpu['name']}, {size(gpu['bytes'])}, compute capability {gpu['capability']}"
    if not report["gpus"]:
        built = f"CUDA {report['cuda']}" if report["cuda"] else "CPUs"
        yield f"{'gpu:':<20}none that torch sees (this torch is built for {built})"
    for name, place in report["caches"].items():
        yield f"{name + ' cache:':<20}{place}"
    for model in report["models"]:
        yield f"{'model:':<20}{model['name']} ({model['source']}, {size(model['bytes'])})"
    for name, value in report["variables"].items():
        yield f"{'variable:':<20}{name} {'is set' if value == 'set' else '= ' + value}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _tilde(path: str | Path) -> str:
    """A path without the user's name in it."""
    home, text = str(Path.home()), str(path)
    return "~" + text[len(home) :] if text.startswith(home + os.sep) else text
