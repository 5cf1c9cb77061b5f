"""`octavo bench` on a machine with an NVIDIA GPU. Skipped elsewhere; see `test_bench.py` for the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

ROWS = ["ready", "one_stream", "first_128", "first_8000", "batch_64", "prefix", "batch"]


def test_all_rows_and_the_curve(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "curve.png"
    done = subprocess.run(
        [sys.executable, "-m", "octavo", "bench", "--model", str(tiny_model), "--seconds", "1", "--plot", str(plot),
         "--json"], capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["device"], report["weights"], report["max_num_seqs"]) == ("cuda", "bfloat16", 256)
    assert [row["name"] for row in report["rows"]] == ROWS
    for row in report["rows"][1:]:
        assert row["value"] > 0
        assert 0 < row["share"] < 1
    _, total = torch.cuda.mem_get_info()
    assert report["weight_bytes"] < report["memory_bytes"] < total
    assert 1e11 < report["bandwidth"] < 2e13, "bytes a second of a card from 2016 to well beyond today's"
    assert 1e12 < report["products_per_second"] < 1e16
    levels = report["sweep"]
    assert [level["concurrency"] for level in levels[:3]] == [1, 2, 4]
    assert levels[-1]["tokens_per_second"] > 4 * levels[0]["tokens_per_second"], "a batch is no faster than one stream"
    for level in levels:
        assert level["tokens_per_second"] < level["limit"]
        for name in ("time_to_first_token", "inter_token_latency"):
            assert 0 < level[name]["p50"] <= level[name]["p90"] <= level[name]["p99"]
    assert plot.read_bytes().startswith(b"\x89PNG\r\n")
