"""LangChain's classes over Octavo: `ChatOctavo` for chat and tools, `OctavoLLM` for completion, `OctavoEmbeddings`.

>>> from langchain_octavo import ChatOctavo
>>> ChatOctavo(temperature=0).invoke("Name a colour.")                  # doctest: +SKIP

Every object of the same model and engine settings uses one engine of the process, and all their calls run in one batch.
"""

from langchain_octavo.chat_models import ChatOctavo
from langchain_octavo.embeddings import OctavoEmbeddings
from langchain_octavo.llms import OctavoLLM
from langchain_octavo.loading import allow_loading

allow_loading(ChatOctavo, OctavoLLM)

__all__ = ["ChatOctavo", "OctavoEmbeddings", "OctavoLLM"]
