"""The program of an engine's process that some prompts end, stop or make raise. Started in its place by
`test_child_poison.py`."""

from __future__ import annotations

import os
import signal
import time

import torch
from octavo.engine.child import program
from octavo.engine.core import EngineCore
from octavo.engine.draft import Draft

DIES, HANGS, DIES_LATE, LOSES, RAISES = 299, 298, 297, 296, 295
"""Tokens of a prompt."""
LATE = 7
"""Outputs of so many tokens come of a prompt with the last of them."""

_launch = EngineCore._launch


def launch(self: EngineCore, draft: Draft) -> None:
    for sequence, _, _ in draft.parts:
        ids = sequence.request.prompt_ids
        if DIES in ids or (DIES_LATE in ids and sequence.num_output >= LATE):
            os.kill(os.getpid(), signal.SIGKILL)
        if HANGS in ids:
            time.sleep(3600)
        if RAISES in ids:
            return self._blame(draft, RuntimeError("shapes [1, 2] and [3] at /ours/model.py"))
        if LOSES in ids and torch.cuda.is_available():
            torch.zeros(4, device="cuda")[torch.full((1,), 1 << 20, device="cuda")]  # a kernel fails, a little later
        elif LOSES in ids:
            self._is_lost = lambda: True
            return self._blame(draft, RuntimeError("CUDA error: an illegal memory access was encountered"))
    return _launch(self, draft)


if __name__ == "__main__":  # and only then: the tests import the tokens above
    EngineCore._launch = launch  # type: ignore[method-assign]
    program.main()
