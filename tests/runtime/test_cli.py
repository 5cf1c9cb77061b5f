"""The `octavo` program as a script meets it: what goes to which stream, exit codes, and what a mistake is told.

Every test runs the real program. `test_chat.py` has the conversation on a terminal.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from octavo import LLM, SamplingParams
from octavo_kernels.cpu.compiler import available

OCTAVO = [sys.executable, "-m", "octavo"]
STORY = "Write a long story about a dog."
"""In every type the default model goes on for 2000 tokens. Counting to 1000 it stops at 20, before a signal arrives."""
QUESTION = "What is the capital of France?"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def environment(cache: Path, tmp_path: Path) -> dict[str, str]:
    """Empty caches, no network, no terminal's colours or width from outside."""
    gone = ("OCTAVO_MODEL", "OCTAVO_DEBUG", "COLUMNS", "FORCE_COLOR", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    return kept | {"OCTAVO_CACHE": str(cache), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}


def octavo(*arguments: object, stdin: str | bytes = b"", env: dict[str, str] | None = None) -> Any:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [*OCTAVO, *map(str, arguments)], input=data, capture_output=True, timeout=200, check=False, env=env
    )
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout + done.stderr, "control sequences, although this is no terminal"
    return done


# -- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["chat"], ["generate"], ["demo"], ["bench"], ["env"], ["models"],
                                       ["models", "pull"], ["models", "remove"]], ids=" ".join)  # fmt: skip
def test_help_says_what_a_command_does(arguments: list[str], environment: dict[str, str]) -> None:
    done = octavo(*arguments, "--help", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Usage: python -m octavo {' '.join(arguments)}".strip() in done.stdout
    if not arguments:
        for command in ("chat", "generate", "models", "bench", "env"):
            assert re.search(rf"^│ {command} +[A-Z]", done.stdout, flags=re.M), command
    assert octavo(*arguments, "-h", env=environment).stdout == done.stdout


def test_without_a_command_it_shows_the_help(environment: dict[str, str]) -> None:
    done = octavo(env=environment)
    assert done.returncode == 2
    assert "Commands" in done.stdout + done.stderr


def test_the_installed_program_is_this_one(environment: dict[str, str]) -> None:
    program = Path(sys.executable).with_name("octavo")
    from octavo import __version__

    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == f"octavo {__version__}\n"


def test_help_does_not_wait_for_torch(environment: dict[str, str]) -> None:
    code = "import sys; from octavo.cli import app; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# -- beam search -----------------------------------------------------------------------------------------------------


def test_generate_searches() -> None:
    """The default temperature for drawing tokens does not count then."""
    raw = ["generate", "--raw", "Once upon a time", "--max-tokens", 12]
    done = octavo(*raw, "--beams", 3, "--length-penalty", 0.5, "--early-stopping", "never", "--json")
    with LLM() as llm:
        params = SamplingParams(
            use_beam_search=True, beam_width=3, length_penalty=0.5, early_stopping="never", max_tokens=12
        )
        assert json.loads(done.stdout)["token_ids"] == llm.generate("Once upon a time", params)[0].outputs[0].token_ids


# -- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[list[str], int, str]] = [
    (["nonsense"], 2, "nonsense"),
    (["generate"], 2, "standard input is empty: say what to answer"),
    (["generate", "  "], 2, "the prompt is empty"),
    (["generate", "x", "--tempature", "1"], 2, "--temperature"),
    (["generate", "x", "--temperature", "-1"], 2, "temperature must be at least 0"),
    (["generate", "x", "--temperature", "hot"], 2, "--temperature"),
    (["generate", "x", "--top-p", "2"], 2, "top_p must be above 0 and at most 1"),
    (["generate", "x", "--max-tokens", "0"], 2, "max_tokens must be at least 1"),
    (["generate", "x", "--max-tokens", "many"], 2, "--max-tokens"),
    (["generate", "x", "--device", "tpu"], 2, "device must be auto, cpu, cuda or cuda:N, not 'tpu'"),
    (["generate", "x", "--dtype", "int3"], 2, "dtype must be one of"),
    (["generate", "x", "--file", "/etc/hosts"], 2, "not both"),
    (["generate", "--file", "/no/such/file"], 2, "/no/such/file cannot be read"),
    (["generate", "x", "--raw", "--system", "y"], 2, "leave out --raw"),
    (["generate", "x", "--model", "/no/such/model"], 1, "nothing is there"),
    (["generate", "x", "--model", "no/such-model"], 1, "no/such-model"),
    (["bench", "--rows", "ready,batches"], 2, "rows: 'batches' is none of ready, one_stream, first_128"),
    (["bench", "--rows", ","], 2, "rows: name at least one of ready"),
    (["bench", "--scale", "2"], 2, "scale must be above 0 and at most 1, not 2"),
    (["bench", "--seconds", "0"], 2, "seconds must be above 0, not 0"),
    (["bench", "--plot", "curve.pdf"], 2, "plot writes a PNG: curve.pdf must end in .png"),
    (["bench", "--plot", "/no/such/folder/curve.png"], 2, "/no/such/folder is not a folder"),
    (["bench", "--load-format", "random"], 2, "load_format must be one of auto, dummy, not 'random'"),
    (["bench", "--load-format", "dummy", "--model", "/etc"], 1, "/etc/config.json: is missing"),
    (["chat", "--min-p", "7"], 2, "min_p must be at least 0 and at most 1"),
    (["generate", "x", "--beams", "3", "-t", "0.7"], 2, "temperature=0.7 does not apply to a beam search"),
    (["generate", "x", "--beams", "3", "--early-stopping", "soon"], 2, 'must be True, False or "never"'),
    (["generate", "x", "--length-penalty", "2"], 2, "length_penalty needs use_beam_search=True"),
    (["models", "show", "no/such-model"], 1, "octavo models pull no/such-model"),
    (["models", "remove", "no/such-model"], 1, "`octavo models` lists those that are"),
    (["models", "show"], 2, "MODEL"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES, ids=[" ".join(m[0])[:40] for m in MISTAKES])
def test_a_mistake_is_told_in_a_line(
    arguments: list[str], code: int, message: str, environment: dict[str, str]
) -> None:
    done = octavo(*arguments, env=environment)
    assert done.returncode == code
    assert done.stdout == ""
    assert message in " ".join(done.stderr.replace("│", " ").split())
    if "Usage" not in done.stderr:  # not typer's own box
        assert done.stderr.startswith("octavo: ")
        assert done.stderr.count("\n") == 1


def test_debug_shows_the_traceback(environment: dict[str, str]) -> None:
    command = [*OCTAVO, "--debug", "generate", "x", "--model", "/no/such/model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ModelNotFoundError" in done.stderr


# -- generate --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> Iterator[Any]:
    """What the library answers to the same."""
    with LLM(str(tiny_model), dtype="float32") as llm:
        params = SamplingParams(temperature=0.0, max_tokens=20)
        yield llm.chat([{"role": "user", "content": "Grüße"}], params)[0]


def test_the_prompt_comes_from_an_argument_a_file_or_stdin(
    tiny_model: Path, expected: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("Grüße\n".encode())
    common = ["--model", tiny_model, "--dtype", "float32", "--temperature", "0", "--max-tokens", "20"]
    for arguments, stdin in (
        (["Grüße"], ""), (["--file", file], "ignored"), ([], "Grüße\n"), (["-"], "Grüße"),
    ):  # fmt: skip
        done = octavo("generate", *arguments, *common, stdin=stdin, env=environment)
        assert (done.returncode, done.stderr) == (0, ""), "nothing but the answer, and no bar"
        assert done.stdout == expected.outputs[0].text + "\n"


def test_json(tiny_model: Path, expected: Any, environment: dict[str, str]) -> None:
    common = ["--model", tiny_model, "--dtype", "float32", "--temperature", "0", "--max-tokens", "20", "--json"]
    done = octavo("generate", "Grüße", *common, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    answer = expected.outputs[0]
    report = json.loads(done.stdout)
    assert report["text"] == answer.text
    assert report["token_ids"] == answer.token_ids
    assert report["finish_reason"] == "length"
    assert report["prompt"] == "user: Grüße\nassistant:"
    assert report["usage"] == {
        "prompt_tokens": len(expected.prompt_token_ids), "cached_tokens": 0, "completion_tokens": 20,
    }  # fmt: skip
    assert 0 < report["timing"]["time_to_first_token"] < report["timing"]["seconds"]
    done = octavo("generate", "Grüße", *common, "--stream", env=environment)
    *pieces, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert "".join(piece["piece"] for piece in pieces) == last["text"] == answer.text
    assert len(pieces) > 10


def test_sampling_options_reach_the_engine(tiny_model: Path, environment: dict[str, str]) -> None:
    def text(*options: object) -> str:
        done = octavo("generate", "Once", "--raw", "-m", tiny_model, "-n", 12, "--json", *options, env=environment)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["prompt"] == "Once"
        return str(report["text"])

    one = text("--seed", 1, "--temperature", 1.5, "--top-p", 1)
    assert one != text("--seed", 2, "-t", 1.5, "--top-p", 1)
    stop = one[len(one) // 2]
    assert text("--seed", 1, "-t", 1.5, "--top-p", 1, "--stop", "never", "--stop", stop) == one.partition(stop)[0]


def test_the_default_model_answers_by_its_own_name(default_model: Path) -> None:
    """Without `--model`, from the ordinary cache."""
    mine = {name: value for name, value in os.environ.items() if name != "OCTAVO_MODEL"} | {"HF_HUB_OFFLINE": "1"}
    done = octavo("generate", QUESTION, "-t", 0, "-n", 24, "--system", "Answer in one sentence.", env=mine)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Paris" in done.stdout


def test_ctrl_c_ends_it_with_130(default_model: Path, environment: dict[str, str]) -> None:
    command = [*OCTAVO, "generate", STORY, "-n", "2000", "-t", "0", "--model", str(default_model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.stdout.read(), process.stderr.read()
        assert process.wait(60) == 130
    assert first
    assert errors == b""
    assert rest.endswith(b"\n")
    assert len(rest) < 4000


def test_a_reader_who_goes_away_is_no_error(default_model: Path, environment: dict[str, str]) -> None:
    """As in `octavo generate ... | head -1`."""
    command = [*OCTAVO, "generate", STORY, "-n", "2000", "-t", "0", "--model", str(default_model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


# -- bench -----------------------------------------------------------------------------------------------------------


def test_bench_measures_rows_beside_their_limits_and_draws(
    default_model: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    plot, rows = tmp_path / "curve.png", "ready,one_stream,first_128,batch_64"
    common = ["--model", default_model, "--rows", rows, "--seconds", 0.2]
    done = octavo("bench", *common, "--plot", plot, "--json", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["device"], report["max_model_len"], report["max_num_seqs"]) == ("cpu", 8192, 64)
    low, high = (90e6, 110e6) if available() else (530e6, 545e6)  # 4 bits a weight where kernels can read them
    assert low < report["weight_bytes"] < high
    assert report["weight_bytes"] < report["memory_bytes"]
    ready, *measured = report["rows"]
    assert (ready["name"], ready["unit"], ready["limit"]) == ("ready", "s", None)
    assert [row["name"] for row in measured] == ["one_stream", "first_128", "batch_64"]
    for row in measured:
        assert row["value"] > 0
        assert row["limit"] > 0
        assert 0 < row["scale"] <= 1
        more = row["unit"] == "tokens/s"
        assert row["share"] == pytest.approx((row["value"] / row["limit"]) ** (1 if more else -1))
    one = measured[0]
    prompt, more = (max(8, int(size * one["scale"])) for size in (128, 256))
    assert one["label"] == f"one stream, {prompt} in, {1 + more} out"
    first = report["sweep"][0]
    assert (first["concurrency"], first["prompt_tokens"], first["output_tokens"]) == (1, 128, 64)
    for level in report["sweep"]:
        for name in ("time_to_first_token", "inter_token_latency"):
            assert 0 < level[name]["p50"] <= level[name]["p90"] <= level[name]["p99"]
    check_picture(plot)


def check_picture(file: Path) -> None:
    """A PNG of three panels, each with lines of its own in it."""
    import numpy as np
    from matplotlib.image import imread

    assert file.read_bytes().startswith(b"\x89PNG\r\n")
    picture = imread(file)[..., :3]
    height, width, _ = picture.shape
    assert (width, height) == (1950, 630)
    blue = np.abs(picture - np.array([0x1F, 0x5F, 0xA8]) / 255).sum(axis=-1) < 0.1
    for third in range(3):
        assert blue[:, third * width // 3 : (third + 1) * width // 3].sum() > 100


def test_bench_prints_a_table_for_a_shape_with_random_weights(
    tiny_model: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """A folder with nothing but a configuration; rows that do not fit say so."""
    config = json.loads((tiny_model / "config.json").read_text())
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    common = ["--model", shape, "--load-format", "dummy", "--dtype", "float32"]
    done = octavo("bench", *common, "--rows", "ready,first_8000,batch", "--scale", 0.25, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^ready +\d", done.stdout, flags=re.M)
    figures = r" +[\d,.]+ +[\d,.]+ +\d+% +"
    assert re.search(rf"^first token of 255{figures}ms +1/4, shortened", done.stdout, flags=re.M)
    assert re.search(rf"^64 requests, \d+ to \d+ in and out{figures}tokens/s +1/4, shortened", done.stdout, flags=re.M)
    assert list(shape.iterdir()) == [shape / "config.json"]
    done = octavo("bench", *common, "--max-model-len", 40, env=environment)
    assert done.returncode == 2
    assert "the engine holds 40 tokens; measuring needs at least 80" in done.stderr


def test_bench_says_how_to_get_what_it_draws_with(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError(name='matplotlib')")
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = octavo("bench", "--plot", tmp_path / "a.png", env=environment | {"PYTHONPATH": paths})
    assert done.returncode == 2
    assert done.stderr == "octavo: --plot needs matplotlib: pip install 'octavo[bench]'\n"


# -- models and env --------------------------------------------------------------------------------------------------


def test_models_are_listed_shown_and_removed(
    default_model: Path, cache: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    empty = octavo("models", env=environment)
    assert empty.returncode == 0
    assert str(cache) in empty.stdout
    assert json.loads(octavo("models", "list", "--json", env=environment).stdout) == []
    place = cache / "pypi" / default_model.parent.name
    place.mkdir(parents=True)
    os.symlink(default_model, place / default_model.name)
    shutil.copy(default_model.with_name("octavo.json"), place)
    name = json.loads((place / "octavo.json").read_text())["name"]
    (row,) = json.loads(octavo("models", "list", "--json", env=environment).stdout)
    assert (row["name"], row["source"], row["path"]) == (name, "pypi", str(place))
    assert row["bytes"] > 9e7
    assert name in octavo("models", env=environment).stdout
    facts = json.loads(octavo("models", "show", name, "--json", env=environment).stdout)
    assert (facts["architecture"], facts["supported"], facts["format"]) == ("LlamaForCausalLM", True, "gguf")
    assert (facts["layers"], facts["vocabulary"], facts["longest_text"]) == (30, 49152, 8192)
    assert 134e6 < facts["parameters"] < 136e6
    text = octavo("models", "show", default_model, env=environment).stdout
    assert re.search(r"architecture +LlamaForCausalLM", text)
    assert re.search(r"parameters +13\d million", text)
    removed = octavo("models", "remove", name, env=environment)
    assert removed.returncode == 0
    assert re.fullmatch(r"98\.\d MB freed\n", removed.stdout)
    assert not place.exists()
    assert default_model.is_file(), "a file elsewhere was touched"
    assert octavo("models", "remove", name, env=environment).returncode == 1


def test_env_tells_what_a_bug_report_needs_and_no_secret(environment: dict[str, str]) -> None:
    import torch

    secret = environment | {"HF_TOKEN": "hf_verysecret", "OMP_NUM_THREADS": "1"}
    done = octavo("env", env=secret)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(rf"^torch: +{re.escape(torch.__version__)}$", done.stdout, flags=re.M)
    assert re.search(r"^octavo: +\d", done.stdout, flags=re.M)
    assert "OMP_NUM_THREADS = 1" in done.stdout
    assert "HF_TOKEN is set" in done.stdout
    assert "verysecret" not in done.stdout
    report = json.loads(octavo("env", "--json", env=secret).stdout)
    assert report["cpu"]["cores"] == os.cpu_count()
    assert "verysecret" not in json.dumps(report)
