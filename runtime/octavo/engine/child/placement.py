"""`InChild`: the placement of an engine in a child process. Used by the server."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.config import EngineConfig
from octavo.engine.child.messages import Files
from octavo.engine.child.service import ChildService
from octavo.engine.start import Engine, Limits, Shape, start_engine
from octavo.models.sources import ModelFiles, Progress
from octavo.processes.channel import module_program


@dataclass(frozen=True)
class InChild:
    """`program`: the command of the process, which gets the descriptor of its channel as its last argument."""

    program: tuple[str, ...] = module_program("octavo.engine.child.program")

    def start(self, config: EngineConfig, progress: Progress | None) -> Engine:
        """See `Placement`. Tokenizer and texts stay in this process, which imports no torch for them."""

        def run(files: ModelFiles, shape: Shape) -> tuple[ChildService, Limits]:
            service = ChildService(self.program, config, Files.of(files))
            return service, service.start(progress)

        return start_engine(config, progress, run)
