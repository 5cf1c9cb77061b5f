"""Makes docs/demo.svg: runs `octavo demo` for real and draws what it printed. Run it again when the demo changes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

done = subprocess.run(
    [sys.executable, "-m", "octavo", "demo"],
    capture_output=True, text=True, check=True, env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": "100"},
)  # fmt: skip
console = Console(record=True, width=100, file=io.StringIO())
console.print(Text("$ make demo\n"))
console.print(Text.from_ansi(done.stdout))
Path(__file__).with_name("demo.svg").write_text(console.export_svg(title="octavo"))
