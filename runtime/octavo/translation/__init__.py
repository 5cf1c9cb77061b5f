"""Translation: languages by any name, texts cut into sentences and put together again, and how each model wants to be
told from what to what. Used by `LLM.translate` and `AsyncLLM.translate`."""
