"""`octavo app`: the page comes, on loopback, and leaves with Ctrl-C; what is wrong is a sentence."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import urllib.request

import psutil
import pytest
from octavo.cli import apps
from octavo.cli.options import UsageProblem


@pytest.mark.parametrize("app", ["chat", "translate"])
def test_the_page_is_served_on_loopback_and_ctrl_c_ends_it(app: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "octavo", "app", app, "--no-browser", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line, line
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=20) as page:
            assert f"Octavo {app}" in page.read().decode()
            policy = page.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        taken = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert taken.returncode == 2
        assert "Choose another --port" in taken.stderr
        sockets = psutil.Process(process.pid).net_connections("inet")
        assert {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, 130)
    finally:
        process.kill()
        process.wait()


def test_without_gradio_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apps, "find_spec", lambda _: None)
    with pytest.raises(UsageProblem, match=r"pip install 'octavo\[apps\]'"):
        apps.chat(browser=False)


def test_a_bad_setting_is_refused_before_the_page_is_there() -> None:
    with pytest.raises(UsageProblem, match="dtype"):
        apps.translate(dtype="int3", browser=False)
