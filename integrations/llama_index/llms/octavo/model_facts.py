"""What LlamaIndex wants to know of a model before the first request: `metadata_of`, and its template as a function.

Called by `fields.OctavoFields`.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.base.llms.types import ChatMessage, LLMMetadata
from llama_index.llms.octavo.messages import to_dicts

from octavo.models.config import load_config
from octavo.models.sources import resolve
from octavo.shared import SharedEngine
from octavo.tokenizer import load_tokenizer


class OwnTemplate:
    """`messages_to_prompt` by the model's own chat template. What it gives is for `complete(..., formatted=True)`."""

    def __init__(self, shared: SharedEngine) -> None:
        self._shared = shared

    def __call__(self, messages: Sequence[ChatMessage]) -> str:
        return self._shared.llm.tokenizer.apply_chat_template(to_dicts(messages))


def metadata_of(shared: SharedEngine) -> LLMMetadata:
    """From the files of the model, or from the engine if it runs. On a GPU the context depends on the memory that the
    weights leave, so there the engine is started."""
    config = shared.config
    if not shared.started:
        from octavo.execute.build import resolve_settings

        files = resolve(config.model, revision=config.revision, token=config.token, need_weights=False)
        model = load_config(files)
        resolved = resolve_settings(config, files, model)
        if resolved.sizes is None:
            tokenizer = load_tokenizer(files, trust_remote_code=config.trust_remote_code)
            return _metadata(config.model, resolved.max_model_len, tokenizer.has_chat_template)
    engine = shared.llm.engine
    return _metadata(config.model, engine.limits.max_model_len, engine.tokenizer.has_chat_template)


def _metadata(model: str, context: int, has_template: bool) -> LLMMetadata:
    return LLMMetadata(
        context_window=context, is_chat_model=has_template, is_function_calling_model=has_template, model_name=model
    )
