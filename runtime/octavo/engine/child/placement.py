"""`InChild`: the placement of an engine in a child process. Used by the server."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from octavo.config import EngineConfig
from octavo.engine.child.messages import Files
from octavo.engine.child.service import ChildService
from octavo.engine.start import Engine, find_files, load_front, load_shape
from octavo.models.sources import Progress
from octavo.processes.channel import module_program


@dataclass(frozen=True)
class InChild:
    """`program`: the command of the process, which gets the descriptor of its channel as its last argument."""

    program: tuple[str, ...] = module_program("octavo.engine.child.program")

    def start(self, config: EngineConfig, progress: Progress | None) -> Engine:
        """See `Placement`. Tokenizer and texts stay in this process, which imports no torch for them."""
        began = time.monotonic()
        files = find_files(config, progress)
        shape = load_shape(files)
        service = ChildService(self.program, config, Files.of(files))
        with ThreadPoolExecutor(1) as background:
            loading = background.submit(load_front, config, files, shape)
            limits = service.start(progress)
            try:
                front = loading.result()
            except BaseException:
                service.close()
                raise
        seconds = time.monotonic() - began
        return Engine(
            config, files, shape, front.tokenizer, service, limits, front.grammars, seconds, front.scheme
        )
