"""The command line, `octavo`. One module a command; `app.py` names them all, `main` starts them.

Nothing heavy is imported before a command needs it: `octavo --help` imports neither torch nor transformers.
"""

from __future__ import annotations

from octavo.cli.app import main

__all__ = ["main"]
