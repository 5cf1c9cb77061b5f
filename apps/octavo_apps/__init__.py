"""Two apps on Octavo's engine, made with Gradio: `chat` talks to a model, `translate` translates texts and files.

Importable blocks, for a page of your own:

    from octavo_apps import chat_blocks, serve
    serve(chat_blocks("Qwen/Qwen3-0.6B"))

Gradio sends no analytics and looks up nothing: that is settled here, before it is imported for the first time.
"""

from __future__ import annotations

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

from octavo_apps.chat import chat_blocks
from octavo_apps.serving import serve
from octavo_apps.translate import translate_blocks

__all__ = ["chat_blocks", "serve", "translate_blocks"]
