"""LlamaIndex's embedding class over Octavo.

>>> from llama_index.embeddings.octavo import OctavoEmbedding
>>> OctavoEmbedding().get_text_embedding("A paged cache.")                  # doctest: +SKIP
"""

from llama_index.embeddings.octavo.base import OctavoEmbedding

__all__ = ["OctavoEmbedding"]
