"""A real Prometheus reads a real server's metrics with the configuration in `deploy/`, and every query of the dashboard
gets an answer."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from serving_helpers import Program, free_port, program  # type: ignore[import-not-found]

DEPLOY = Path(__file__).parents[2] / "deploy"
KEY = "a-key-for-prometheus"


def queries() -> list[tuple[str, str]]:
    dashboard = json.loads((DEPLOY / "grafana/dashboards/octavo.json").read_text())
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def server() -> Iterator[Program]:
    with program("--api-key", KEY, headers={"Authorization": f"Bearer {KEY}"}) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(server: Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address. It runs by our configuration, but for the place of the server and of the key, and reads faster."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("needs Prometheus (Debian's package of that name)")
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())
    (folder / "key").write_text(KEY)
    config["global"]["scrape_interval"] = "1s"
    (job,) = config["scrape_configs"]
    job["authorization"]["credentials_file"] = str(folder / "key")
    job["static_configs"] = [{"targets": [server.url.removeprefix("http://")]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [program, f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}",
         f"--web.listen-address={address}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(20)


def ask(prometheus: str, query: str) -> list[Any]:
    try:
        reply = httpx.get(f"{prometheus}/api/v1/query", params={"query": query})
    except httpx.ConnectError:
        return []  # it is starting
    if reply.status_code == 503:
        return []  # it reads its files
    answer = reply.json()
    assert answer["status"] == "success", f"{query}: {answer.get('error')}"
    return [float(item["value"][1]) for item in answer["data"]["result"]]


def test_every_query_of_the_dashboard_returns_data(server: Program, prometheus: str) -> None:
    client = httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    body = {"prompt": "The capital of France is", "max_tokens": 4}
    missing = queries()
    deadline = time.monotonic() + 60
    while missing and time.monotonic() < deadline:
        assert client.post("/v1/completions", json=body).status_code == 200
        assert client.post("/v1/completions", json=body | {"n": -1}).status_code == 400
        for title, query in list(missing):
            asked = re.sub(r"\$__rate_interval", "15s", query.replace("$model", ".*"))
            values = ask(prometheus, asked)
            if values and all(map(math.isfinite, values)):
                missing.remove((title, query))
    assert not missing
    assert ask(prometheus, "up") == [1.0]
    assert ask(prometheus, "vllm:generation_tokens_total")[0] >= 4


def test_files_name_what_exists() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            place = volume.split(":")[0]
            assert place in compose["volumes"] or (DEPLOY / place).exists(), volume
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), "open to the world"
    build = compose["services"]["octavo"]["build"]
    dockerfile = (DEPLOY.parent / build["dockerfile"]).read_text()
    assert f" AS {build['target']}\n" in dockerfile
    for copied in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE):
        assert all((DEPLOY.parent / name).exists() for name in copied.split())
    target = yaml.safe_load((DEPLOY / "prometheus/prometheus.yaml").read_text())["scrape_configs"][0]
    host, port = target["static_configs"][0]["targets"][0].split(":")
    assert host in compose["services"]
    assert f'"--port", "{port}"' in dockerfile


def test_the_commands_of_the_files_are_ours() -> None:
    """The options that they give `octavo serve` exist."""
    from octavo.cli.app import app
    from typer.main import get_command

    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {option for parameter in serve.params for option in parameter.opts}
    used: set[str] = set()
    for name in ("Dockerfile", "compose.yaml", "kubernetes/octavo.yaml"):
        text = (DEPLOY / name).read_text()
        lines = [line for line in text.splitlines() if re.search(r"ENTRYPOINT|command: \[|args: \[", line)]
        used |= {
            option for line in lines if "--config.file" not in line for option in re.findall(r'"(--[a-z-]+)"', line)
        }
    assert used
    assert used <= known
