"""The jobs themselves: what a child of the guard's worker does before it ends. Called by `guard_worker`."""

from __future__ import annotations

import json
from collections.abc import Mapping

from octavo.chat.tools import schema_reason
from octavo.chat_template import render_chat
from octavo.decode.grammar import Grammars
from octavo.errors import RequestError
from octavo.processes.guard_messages import Answer, Job
from octavo.structured_outputs import StructuredOutputsParams


def warm() -> None:
    """Import and make what children would otherwise make each for itself."""
    schema_reason("{}")
    render_chat("{{ messages }}", [{"role": "user", "content": ""}])


def run(job: Job, grammars: Mapping[int, Grammars]) -> Answer:
    """Raises nothing, whatever it is given; but it may take all time and memory that there is, or crash."""
    try:
        if job.kind == "grammar":
            return _grammar(job, grammars[job.model])
        if job.kind == "schema":
            reason = schema_reason(job.body)
            return Answer(job.number, "refused" if reason else "fine", reason)
        return _template(job)
    except RequestError as error:
        return Answer(job.number, "refused", str(error), error.field)
    except MemoryError:
        return Answer(job.number, "large")
    except BaseException as error:  # a panic of a library is no Exception
        return Answer(job.number, "broken", f"{type(error).__name__}: {str(error)[:300]}")


def _grammar(job: Job, grammars: Grammars) -> Answer:
    """Compiled, and followed for some steps: the library does most of the work when it is first asked what may come."""
    grammars.compile(StructuredOutputsParams(**json.loads(job.body))).try_out()
    return Answer(job.number, "fine")


def _template(job: Job) -> Answer:
    given = json.loads(job.body)
    longest = given.pop("longest")
    text = render_chat(**given)
    if len(text.encode("utf-8", "replace")) > longest:
        raise RequestError("the chat template writes more than the model holds", "chat_template")
    return Answer(job.number, "fine", text)
