"""Octavo for LlamaIndex: `Octavo`, an LLM that runs in this process.

>>> from llama_index.llms.octavo import Octavo
>>> llm = Octavo(temperature=0)                       # doctest: +SKIP
>>> llm.complete("The capital of France is")          # doctest: +SKIP
"""

from llama_index.llms.octavo.llm import Octavo

__all__ = ["Octavo"]
