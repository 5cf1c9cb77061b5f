"""The guard, with its real worker: a job that explodes ends alone, and nothing else waits long for it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from octavo.decode.grammar import KEPT_SOURCE, Grammars
from octavo.errors import EngineClosedError, QueueFullError, RequestError
from octavo.models.sources import files_at
from octavo.processes.guard import MOST_WAITING, Guard
from octavo.processes.guard_messages import Answer
from octavo.processes.guarded import Approved, GuardedGrammars, Verdicts, _text
from octavo.structured_outputs import StructuredOutputsParams
from octavo.tokenizer import Tokenizer, load_tokenizer

SECOND = 3.5
"""Of a machine that others use (`guard_worker.MOST_SECONDS`)."""
SLOW = {"type": "integer", "multipleOf": 1000003}
"""The library takes 8 s and 300 MB for it."""
USER = [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(files_at(tiny_model, "tiny", "local"))


@pytest.fixture(scope="module")
def guard() -> Iterator[Guard]:
    made = Guard()
    yield made
    made.close()


@pytest.fixture(scope="module")
def verdicts(guard: Guard, tokenizer: Tokenizer) -> Verdicts:
    made = new(guard, tokenizer)
    made.check(StructuredOutputsParams(regex="ready"))
    return made


def new(guard: Guard, tokenizer: Tokenizer) -> Verdicts:
    return Verdicts(guard, tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)


def slow(number: int) -> StructuredOutputsParams:
    """Many that are slow, no two of them the same."""
    return StructuredOutputsParams(json={**SLOW, "maximum": number})


def resident(pid: int) -> float:
    """MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def until(what: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def refusal(verdicts: Verdicts, params: StructuredOutputsParams) -> str:
    """On a machine that others use it may take several tries: the clock ends what had no processor."""
    for _ in range(20):
        began = time.monotonic()
        with pytest.raises((RequestError, QueueFullError)) as caught:
            verdicts.check(params)
        assert time.monotonic() - began < SECOND
        if isinstance(caught.value, RequestError):
            break
    assert isinstance(caught.value, RequestError)
    assert caught.value.field == "structured_outputs"
    return str(caught.value)


# -- grammars --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"regex": "(a+)+b"}, {"regex": "a{1,1000000}"}, {"regex": "(a{1,1000}){1,1000}"}, {"regex": ".*a.{200}"},
        {"choice": ["yes", "no"]}, {"json_object": True}, {"grammar": 'start: s\ns: s s | "a" |'},
        {"json": {"$defs": {"t": {"type": "object", "properties": {"next": {"$ref": "#/$defs/t"}}}},
                  "$ref": "#/$defs/t"}},
    ],
)  # fmt: skip
def test_what_only_looks_bad_is_fine(verdicts: Verdicts, given: dict[str, Any]) -> None:
    params = StructuredOutputsParams(**given)
    verdicts.check(params)
    assert verdicts.known(params)


BOMBS: dict[str, dict[str, Any]] = {
    "many divisors": {"json": SLOW},
    "a megabyte of choices": {"choice": [f"choice {number}" for number in range(55_000)]},
    "a tree of unions": {"grammar": "start: " + " ".join(f"r{i}?" for i in range(20_000)) + "\n"
                         + "\n".join(f'r{i}: "a{i}"' for i in range(20_000))},
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_what_takes_too_long_is_refused(guard: Guard, verdicts: Verdicts, name: str) -> None:
    before = guard.pid
    assert "make it smaller" in refusal(verdicts, StructuredOutputsParams(**BOMBS[name]))
    verdicts.check(StructuredOutputsParams(regex=f"after {name}"))
    assert guard.pid == before


@pytest.mark.parametrize(
    "given",
    [
        {"json": {"$ref": "#"}}, {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
        {"json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
        {"json": {"properties": {f"k{number}": {} for number in range(20_000)}}}, {"regex": "("}, {"regex": "(a)\\1"},
        {"regex": "(" * 200_000 + ")" * 200_000}, {"grammar": "root ::= " + "(" * 3000 + '"a"' + ")" * 3000},
        {"grammar": "start: " + "(" * 100_000}, {"regex": "(a?){500}a{500}"}, {"grammar": "start: nowhere"},
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(verdicts: Verdicts, given: dict[str, Any]) -> None:
    message = refusal(verdicts, StructuredOutputsParams(**given))
    assert "verbose" not in message
    assert verdicts.known(StructuredOutputsParams(**given))  # and not asked again


def test_a_schema_of_great_depth_is_refused(verdicts: Verdicts) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(120):
        deep = {"type": "object", "properties": {"a": deep}}
    assert "recursion" in refusal(verdicts, StructuredOutputsParams(json=deep))


def test_many_ask_and_one_job_is_done(guard: Guard, tokenizer: Tokenizer) -> None:
    verdicts, asked = new(guard, tokenizer), 0
    plain = guard.ask

    def counted(*given: Any) -> Future[Answer]:
        nonlocal asked
        asked += 1
        return plain(*given)

    guard.ask = counted  # type: ignore[method-assign]
    try:
        same = StructuredOutputsParams(regex="a{40}(b|c){1,900}")
        threads = [threading.Thread(target=verdicts.check, args=(same,)) for _ in range(20)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
    finally:
        guard.ask = plain  # type: ignore[method-assign]
    assert asked == 1


def test_schemas_are_judged_by_themselves(verdicts: Verdicts) -> None:
    tree: dict[str, Any] = {"type": "string"}
    for _ in range(5):
        tree = {"anyOf": [{"type": "object", "properties": {f"k{number}": tree}} for number in range(6)]}
    assert asyncio.run(verdicts.reason('{"type": "object"}')) == ""
    assert "nope" in asyncio.run(verdicts.reason('{"type": "nope"}'))
    assert "too large" in asyncio.run(verdicts.reason(json.dumps(tree)))


def test_thousands_of_grammars_leave_no_memory_behind(guard: Guard, verdicts: Verdicts) -> None:
    assert guard.pid is not None
    before = resident(guard.pid)
    for number in range(300):
        verdicts.check(StructuredOutputsParams(regex=f"(a+{number})+b[0-9]{{1,{number + 1}}}"))
    assert resident(guard.pid) < before + 5
    assert not children(guard.pid)


# -- one that floods -------------------------------------------------------------------------------------------------


def test_slow_ones_do_not_hold_up_others(guard: Guard, verdicts: Verdicts, tokenizer: Tokenizer) -> None:
    flood = [verdicts._ask("grammar", _text(slow(number))) for number in range(8)]
    time.sleep(1.0)
    began = time.monotonic()
    verdicts.check(StructuredOutputsParams(regex="quick"))
    took = time.monotonic() - began
    assert not all(one.done() for one in flood)
    assert took < 8 * 0.15 + 1.0  # the first moments of each, at most
    for one in flood:
        end = one.exception(60) or one.result()
        assert isinstance(end, QueueFullError) or "too long" in str(end)


@pytest.mark.slow
def test_too_many_are_refused_at_once(guard: Guard, tokenizer: Tokenizer) -> None:
    verdicts = new(guard, tokenizer)
    asked = [verdicts._ask("grammar", _text(slow(number))) for number in range(64)]
    assert len(asked) == MOST_WAITING
    began = time.monotonic()
    with pytest.raises(QueueFullError):
        verdicts.check(StructuredOutputsParams(regex="one too many"))
    assert time.monotonic() - began < 0.5
    ends = [one.exception(120) or one.result() for one in asked]
    assert all(isinstance(end, QueueFullError) or "too long" in str(end) for end in ends)
    assert sum(isinstance(end, QueueFullError) for end in ends) >= 20  # those beyond what stands still
    assert guard.pid is not None
    until(lambda: not children(guard.pid or 0))
    verdicts.check(StructuredOutputsParams(regex="one too many"))  # a busy guard says nothing of another time


# -- templates -------------------------------------------------------------------------------------------------------


def render(guard: Guard, template: str, **more: Any) -> Answer:
    body = {"template": template, "messages": USER, "tools": None, "variables": {}, "longest": 1 << 20, **more}
    return guard.ask("template", json.dumps(body)).result(30)


def test_a_template_is_rendered(guard: Guard) -> None:
    answer = render(guard, "{% for m in messages %}{{ m.role }}{{ x }}{% endfor %}", variables={"x": "é" * 5000})
    assert (answer.outcome, answer.text) == ("fine", "user" + "é" * 5000)


LOOP = "{%% for a in range(99999) %%}%s{%% endfor %%}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}{% endfor %}", "{{ range(10**9) | list }}", "{{ 'a' * 10**10 }}",
        "{{ 10 ** (10 ** 10) }}", LOOP % (LOOP % "x"),
        "{{ ''.__class__.__mro__ }}", "{{ messages.__class__.__base__ }}",
        "{% set x = namespace(a='a') %}" + LOOP % "{% set x.a = x.a ~ x.a %}",
        "{{ ('a' * 30000000) | replace('a', 'b' * 30000000) }}", "{{ '%2000000000d' % 1 }}", "{{ cycler.__init__() }}",
        "{% for i in range(30) %}{{ ('x' * 1000000) }}{% endfor %}", "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{{ '" + "{:>99999999}" * 9 + "'.format(1,1,1,1,1,1,1,1,1) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ (range(99999) | list) | map('string') | join('x' * 9999) }}", "{{ 'a' | wordwrap(10**9) | indent(10**9) }}",
        "{% for i in range(99999) %}{{ (range(99999) | list) | sort | first }}{% endfor %}",
        "{{ " + " + ".join(["1"] * 60_000) + " }}", "{% if 1 %}" * 20_000, "{{ lipsum(n=10**6) }}",
        "{% set a = (range(99999) | list) * 300 %}{% set b = a + a %}",
    ],
)  # fmt: skip
def test_templates_that_explode(guard: Guard, template: str) -> None:
    before, began = guard.pid, time.monotonic()
    answer = render(guard, template)
    assert time.monotonic() - began < SECOND
    assert answer.outcome in ("refused", "slow", "late", "large", "broken")
    assert "0x" not in answer.text
    assert render(guard, "b").text == "b"
    assert guard.pid == before


# -- processes -------------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_is_replaced_and_nothing_is_lost(guard: Guard, verdicts: Verdicts) -> None:
    asked = [verdicts._ask("grammar", _text(StructuredOutputsParams(regex=f"lost{number}"))) for number in range(10)]
    before = guard.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    assert [one.result(30) for one in asked] == [""] * 10
    verdicts.check(StructuredOutputsParams(regex="the new one knows the model"))
    assert guard.pid not in (None, before)


def test_a_job_that_kills_workers_is_given_up(tokenizer: Tokenizer) -> None:
    guard = Guard()
    try:
        verdicts = new(guard, tokenizer)
        verdicts.check(StructuredOutputsParams(regex="ready"))
        asked = verdicts._ask("grammar", _text(StructuredOutputsParams(json=SLOW)))
        for _ in range(2):
            until(lambda: guard.pid is not None and bool(children(guard.pid)))
            gone = guard.pid
            assert gone is not None
            os.kill(gone, signal.SIGKILL)
            until(lambda gone=gone: guard.pid != gone)  # type: ignore[misc]
        assert asked.exception(30) is not None
        verdicts.check(StructuredOutputsParams(regex="others go on"))
    finally:
        guard.close()


def test_it_ends_with_what_it_guards(tokenizer: Tokenizer) -> None:
    guard = Guard()
    verdicts = new(guard, tokenizer)
    verdicts.check(StructuredOutputsParams(regex="ready"))
    pid, asked = guard.pid, verdicts._ask("grammar", _text(StructuredOutputsParams(json=SLOW)))
    guard.close()
    guard.close()
    assert isinstance(asked.exception(5), EngineClosedError)
    assert pid is not None
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(EngineClosedError):
        verdicts.check(StructuredOutputsParams(regex="late"))
    assert not [thread for thread in threading.enumerate() if thread.name == "octavo-guard" and not thread.is_alive()]


ORPHAN = """
import json, sys, time
from octavo.processes.guard import Guard
guard = Guard()
for number in range(4):
    guard.ask("template", json.dumps({"template": "{% for i in range(9999) %}" * 3 + "{% endfor %}" * 3, "messages":
        [{"role": "user", "content": str(number)}], "tools": None, "variables": {}, "longest": 9}))
while guard.pid is None:
    time.sleep(0.01)
time.sleep(float(sys.argv[1]))
print(guard.pid, flush=True)
time.sleep(60)
"""


def test_it_does_not_outlive_a_parent_that_is_killed() -> None:
    command = [sys.executable, "-c", ORPHAN, "1.0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ":".join(sys.path)}) as one:
        assert one.stdout is not None
        pid = int(one.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        below = children(pid)
        one.kill()
        until(lambda: not any(Path(f"/proc/{process}").exists() for process in (pid, *below)))


# -- in the place of `Grammars` --------------------------------------------------------------------------------------


def test_grammars_that_are_guarded(verdicts: Verdicts, tokenizer: Tokenizer) -> None:
    inner = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    guarded, params = GuardedGrammars(verdicts, inner), StructuredOutputsParams(regex="[a-c]{3}")
    assert not guarded.known(params)
    guarded.compile(params).start()
    assert guarded.known(params)
    assert inner.known(params)
    with pytest.raises(RequestError, match="too long"):
        guarded.compile(StructuredOutputsParams(json=SLOW))
    assert not inner.known(StructuredOutputsParams(json=SLOW))


def test_grammars_of_another_process(verdicts: Verdicts) -> None:
    guarded, params = GuardedGrammars(verdicts), StructuredOutputsParams(regex="[a-c]{4}")
    assert guarded.compile(params).start() == Approved(params)
    assert guarded.known(params)


def test_an_engine_does_not_keep_many_large_grammars(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)
    made = [StructuredOutputsParams(choice=["a" * 100_000, str(number)]) for number in range(60)]
    for params in made:
        grammars.compile(params)
    kept = [params for params in made if grammars.known(params)]
    assert kept == made[-len(kept) :]
    assert 0 < len(kept) * 100_000 <= KEPT_SOURCE
