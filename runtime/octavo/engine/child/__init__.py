"""An engine in a process of its own, as the server has it: that process may die or hang, and is replaced.

In the server's process: `InChild` (placement.py) starts a `ChildService` (service.py), which keeps a `Ledger` of what
runs and holds one child after the other (`processes.py`). In the child: `program.py` runs the same `EngineService` as
everywhere, `outbox.py` sends what its steps bring. `messages.py` is what they say to each other.
"""
