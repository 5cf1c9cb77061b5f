"""Measuring an engine beside what its machine could do at most. Called by `octavo bench` and `benchmarks/gpu.py`.

`workloads` defines the rows, `limits` the least time that a machine needs for them, `machine` measures what the machine
can do, `run` measures a row on an engine, `sweep` goes over concurrency and `plot` draws that. `shapes` makes a model
folder of a configuration alone. Only `plot` needs matplotlib, and nothing here needs rich or typer.
"""
