"""What is shipped: the wheel and the source archive, what importing costs, and which floor imports which."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RUNTIME, KERNELS = ROOT / "runtime" / "octavo", ROOT / "kernels" / "octavo_kernels"
INTEGRATIONS, APPS = ROOT / "integrations", ROOT / "apps"
HEAVY = ("torch", "transformers", "tokenizers", "triton", "numpy", "huggingface_hub", "jinja2", "rich", "typer")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def python(code: str, **more: Any) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120, **more
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- importing -------------------------------------------------------------------------------------------------------


def test_importing_octavo_takes_no_time_and_brings_nothing_heavy() -> None:
    code = f"""
import sys, time
began = time.perf_counter()
import octavo
took = time.perf_counter() - began
assert not set({HEAVY!r}) & set(sys.modules), set({HEAVY!r}) & set(sys.modules)
assert "LLM" in dir(octavo)
print(took)
"""
    seconds = [float(python(code)) for _ in range(5)]
    assert min(seconds) < 0.2, seconds


def test_every_public_name_is_there_and_others_are_not() -> None:
    import octavo

    for name in octavo.__all__:
        assert getattr(octavo, name) is not None
    with pytest.raises(AttributeError, match="LLMM"):
        octavo.LLMM  # noqa: B018


def test_the_engine_room_imports_no_torch() -> None:
    names = sorted(path.stem for path in (RUNTIME / "engine").glob("*.py") if path.stem != "__init__")
    assert len(names) >= 7
    for name in names:
        python(f"import sys, octavo.engine.{name}; assert 'torch' not in sys.modules and 'triton' not in sys.modules")


# -- the code --------------------------------------------------------------------------------------------------------

WAITING = {"item", "cpu", "tolist", "numpy", "synchronize"}
"""Methods that make the host wait for the device."""
STEP_PATH = [
    *(RUNTIME / "execute" / f"{name}.py" for name in ("runner", "table", "transfer", "context")),
    *(RUNTIME / "decode" / f"{name}.py" for name in ("sampler", "processors", "row")),
    *sorted((RUNTIME / "layers").glob("*.py")), RUNTIME / "models" / "llama.py", RUNTIME / "attention" / "triton.py",
]  # fmt: skip


def waits(source: str) -> list[str]:
    return [
        f"line {node.lineno}: .{node.func.attr}()"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITING
    ]


@pytest.mark.parametrize("path", STEP_PATH, ids=lambda path: str(path.relative_to(RUNTIME)))
def test_nothing_in_a_step_waits_for_the_device(path: Path) -> None:
    """Only `execute/result.py` may: there the oldest step is waited for."""
    assert not waits(path.read_text())
    assert waits((RUNTIME / "execute" / "result.py").read_text()), "this search finds nothing"


def imported(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name.partition(".")[0]) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield path, node.module.partition(".")[0]


def test_arrows_between_the_floors_only_go_down() -> None:
    for path, module in imported(KERNELS):
        allowed = {"torch", "triton", "numpy", "llvmlite", "octavo_kernels"}
        assert module in allowed or module in sys.stdlib_module_names, f"{path} imports {module}"
    above = {"langchain_octavo", "llama_index", "octavo_apps", "langchain_core", "gradio"}
    for path, module in imported(RUNTIME):
        assert module not in above, f"{path} imports {module}"
        if module in ("fastapi", "starlette", "uvicorn", "pydantic"):
            assert RUNTIME / "server" in path.parents, f"{path} imports {module}"


def test_what_the_apps_import_is_declared(project: dict[str, Any]) -> None:
    named = {"docx": "python-docx", "starlette": "gradio", "markdown_it": "markdown-it-py", "lxml": "python-docx"}
    requirements = [*project["dependencies"], *project["optional-dependencies"]["apps"]]
    declared = {name_of(requirement) for requirement in requirements} | {"octavo", "octavo_apps"}
    for path, module in imported(APPS / "octavo_apps"):
        known = module in sys.stdlib_module_names or named.get(module, module) in declared
        assert known, f"{path} imports {module}"


def test_no_pickle_is_read_but_as_tensors() -> None:
    for path, module in imported(RUNTIME):
        assert module not in {"pickle", "dill", "joblib", "shelve", "marshal"}, path
    for path in RUNTIME.rglob("*.py"):
        for call in re.findall(r"\btorch\.load\(.*", path.read_text()):
            assert path.name == "pickled.py", path
            assert "weights_only=True" in call


# -- the distribution ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)], capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return archive, wheel


def test_the_wheel_has_all_of_the_packages_and_nothing_else(built: tuple[Path, Path]) -> None:
    assert built[1].name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        metadata = next(wheel.read(name).decode() for name in names if name.endswith("/METADATA"))
        entries = next(wheel.read(name).decode() for name in names if name.endswith("/entry_points.txt"))
    folder = next(name for name in names if name.endswith("/METADATA")).partition("/")[0]
    code = {name for name in names if not name.startswith(folder)}
    wanted = {
        str(path.relative_to(floor)) for floor in (RUNTIME.parent, KERNELS.parent, INTEGRATIONS, APPS)
        for path in floor.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }  # fmt: skip
    assert code == wanted
    assert "llama_index/__init__.py" not in names  # or it would hide llama-index-core's own
    assert "llama_index/llms/__init__.py" not in names
    assert {"octavo/py.typed", "octavo_kernels/py.typed"} <= names
    assert f"{folder}/licenses/LICENSE" in names
    assert "octavo = octavo.cli:main" in entries
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: <3.14,>=3.11" in metadata
    assert re.search(r"^Requires-Dist: torch>=2\.11$", metadata, flags=re.M)


def test_the_source_archive_builds_and_tests(built: tuple[Path, Path]) -> None:
    """The wheel of `built` came out of it; what `make test` needs is in it too."""
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile", "requirements.lock", "runtime/octavo/py.typed",
                 "kernels/octavo_kernels/__init__.py", "tests/conftest.py", "docs/architecture.md"):  # fmt: skip
        assert name in names, name
    assert not [name for name in names if name.endswith((".pyc", ".whl", ".safetensors", ".gguf"))]


def test_the_installed_wheel_runs(built: tuple[Path, Path], tmp_path: Path, tiny_model: Path) -> None:
    """Beside the dependencies that are here, and not from this folder."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target",
         str(tmp_path / "site"), str(built[1])], capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    code = f"""
import octavo, octavo_kernels
from octavo import LLM, SamplingParams
with LLM({str(tiny_model)!r}) as llm:
    print(len(llm.generate("Hello", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))
print(octavo.__file__, octavo_kernels.__file__)
"""
    tokens, places = python(code, cwd=tmp_path, env=environment).splitlines()
    assert tokens == "3"
    assert places.split() == [str(tmp_path / "site" / name / "__init__.py") for name in ("octavo", "octavo_kernels")]


# -- what is declared ------------------------------------------------------------------------------------------------


def name_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def test_version_and_extras(project: dict[str, Any]) -> None:
    import octavo

    assert octavo.__version__ == project["version"]
    assert set(project["optional-dependencies"]) == {
        "langchain", "llama-index", "server", "otel", "apps", "gguf", "ray", "bench", "dev",
    }  # fmt: skip
    assert project["requires-python"] == ">=3.11,<3.14"
    assert "torch>=2.11" in project["dependencies"]
    assert project["license"] == "Apache-2.0"


def test_the_lock_has_every_dependency_at_one_version(project: dict[str, Any]) -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    pinned = {name_of(line): line for line in lines}
    assert len(pinned) == len(lines), "a package is named twice"
    assert all("==" in line for line in lines)
    extras = project["optional-dependencies"]
    locked = [name for extra in ("apps", "bench", "server", "otel", "dev") for name in extras[extra]]
    for requirement in [*project["dependencies"], *locked]:
        assert name_of(requirement) in pinned, requirement
    assert pinned["torch"] == "torch==2.13.0", "a local version (+cpu) would not install on a GPU machine"


def test_what_the_runtime_imports_is_declared(project: dict[str, Any]) -> None:
    declared = {name_of(requirement) for requirement in project["dependencies"]} | {"octavo", "octavo-kernels"}
    plot = RUNTIME / "bench" / "plot.py"
    extra = {plot: {name_of(requirement) for requirement in project["optional-dependencies"]["bench"]}}
    server = {name_of(requirement) for requirement in project["optional-dependencies"]["server"]}
    server |= {"starlette", "pydantic", "pydantic-core"}  # FastAPI's own
    extra |= dict.fromkeys((RUNTIME / "server").rglob("*.py"), server)
    for theirs in ((RUNTIME / "processes").glob("guard*.py"), (RUNTIME / "engine" / "child").glob("*.py")):
        extra |= dict.fromkeys(theirs, server)  # only the server starts these
    extra[RUNTIME / "server" / "tracing.py"] = {"opentelemetry"}  # the extra otel
    for path, module in imported(RUNTIME):
        name = module.lower().replace("_", "-")
        known = declared | extra.get(path, set())
        assert module in sys.stdlib_module_names or name in known, f"{path} imports {module}"
