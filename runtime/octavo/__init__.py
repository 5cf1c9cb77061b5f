"""Octavo: a local LLM runtime with a paged KV cache.

>>> from octavo import LLM, SamplingParams
>>> llm = LLM()                                                     # doctest: +SKIP
>>> llm.generate("The capital of France is", SamplingParams(temperature=0))  # doctest: +SKIP

Names are imported on first use, so that `import octavo` takes milliseconds and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LLM": "octavo.llm",
    "AsyncLLM": "octavo.async_llm",
    "SamplingParams": "octavo.sampling_params",
    "BeamSearchParams": "octavo.beam_search",
    "BeamSearchOutput": "octavo.beam_search",
    "StructuredOutputsParams": "octavo.structured_outputs",
    "EngineConfig": "octavo.config",
    "RequestOutput": "octavo.outputs",
    "CompletionOutput": "octavo.outputs",
    "StreamPiece": "octavo.outputs",
    "EmbeddingOutput": "octavo.outputs",
    "Logprob": "octavo.outputs",
    "RequestMetrics": "octavo.outputs",
    "OctavoError": "octavo.errors",
    "ConfigError": "octavo.errors",
    "RequestError": "octavo.errors",
    "ModelFileError": "octavo.errors",
    "UnsupportedModelError": "octavo.errors",
    "ModelNotFoundError": "octavo.errors",
    "DownloadError": "octavo.errors",
    "QueueFullError": "octavo.errors",
    "EngineClosedError": "octavo.errors",
    "ForkedEngineError": "octavo.errors",
    "RequestFailedError": "octavo.errors",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore

if TYPE_CHECKING:
    from octavo.async_llm import AsyncLLM as AsyncLLM
    from octavo.beam_search import BeamSearchOutput as BeamSearchOutput
    from octavo.beam_search import BeamSearchParams as BeamSearchParams
    from octavo.config import EngineConfig as EngineConfig
    from octavo.errors import ConfigError as ConfigError
    from octavo.errors import DownloadError as DownloadError
    from octavo.errors import EngineClosedError as EngineClosedError
    from octavo.errors import ForkedEngineError as ForkedEngineError
    from octavo.errors import ModelFileError as ModelFileError
    from octavo.errors import ModelNotFoundError as ModelNotFoundError
    from octavo.errors import OctavoError as OctavoError
    from octavo.errors import QueueFullError as QueueFullError
    from octavo.errors import RequestError as RequestError
    from octavo.errors import RequestFailedError as RequestFailedError
    from octavo.errors import UnsupportedModelError as UnsupportedModelError
    from octavo.llm import LLM as LLM
    from octavo.outputs import CompletionOutput as CompletionOutput
    from octavo.outputs import EmbeddingOutput as EmbeddingOutput
    from octavo.outputs import Logprob as Logprob
    from octavo.outputs import RequestMetrics as RequestMetrics
    from octavo.outputs import RequestOutput as RequestOutput
    from octavo.outputs import StreamPiece as StreamPiece
    from octavo.sampling_params import SamplingParams as SamplingParams
    from octavo.structured_outputs import StructuredOutputsParams as StructuredOutputsParams


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
