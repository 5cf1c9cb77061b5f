"""Who is to blame where the engine's process ends, and what is sent again: the ledger by itself."""

from __future__ import annotations

from octavo import SamplingParams
from octavo.engine.child.ledger import Ledger
from octavo.engine.child.messages import Event, Generate, Problem, Started
from octavo.engine.embed_request import EmbedEvent, EmbedRequest
from octavo.engine.request import Request, TokenEvent
from octavo.errors import EngineClosedError, ModelFileError, RequestError, RequestFailedError


class Caller:
    """Keeps what it is told."""

    def __init__(self, **params: object) -> None:
        self.events: list[TokenEvent] = []
        self.request = Request(
            "r", [1, 2], SamplingParams(max_tokens=20, **params), self.events.append, max_tokens=20  # type: ignore[arg-type]
        )


def send(ledger: Ledger) -> list[int]:
    """Numbers of what a process gets now."""
    found = ledger.next_to_send()
    for entry in found:
        entry.sent = True
    return [entry.number for entry in found]


def bring(ledger: Ledger, number: int, *tokens: int, **more: object) -> None:
    delivery = ledger.take(Event(number, token_ids=list(tokens), **more))  # type: ignore[arg-type]
    if delivery is not None:
        delivery.run()


def test_a_request_goes_on_from_what_was_sent_of_it() -> None:
    ledger, caller = Ledger(), Caller(n=2)
    ledger.open(caller.request)
    assert send(ledger) == [1]
    ledger.start(Started(1, 0.5, 0))
    assert ledger.waiting == 0
    bring(ledger, 1, 7)
    bring(ledger, 1, 8, index=1)
    bring(ledger, 1, 9, index=1, finish_reason="stop")
    assert ledger.strike() is None
    assert send(ledger) == [1]
    again = ledger.message(ledger.entries[1])
    assert isinstance(again, Generate)
    assert again.made is not None
    assert [(made.token_ids, made.ended) for made in again.made] == [([7], False), ([8, 9], True)]
    bring(ledger, 1, 5, index=1)  # nothing can follow its end
    bring(ledger, 1, 6, finish_reason="length")
    assert [(event.index, event.token_ids) for event in caller.events] == [(0, [7]), (1, [8]), (1, [9]), (0, [6])]
    assert not ledger.entries
    assert caller.request.finished
    assert caller.request.metrics.output_tokens == 4


def test_a_search_begins_anew_and_what_comes_again_is_dropped() -> None:
    ledger, caller = Ledger(), Caller(use_beam_search=True, n=1, beam_width=2, temperature=0.0)
    ledger.open(caller.request)
    send(ledger)
    bring(ledger, 1, 3, 4)
    ledger.strike()
    send(ledger)
    again = ledger.message(ledger.entries[1])
    assert isinstance(again, Generate)
    assert again.made is None
    bring(ledger, 1, 3)
    bring(ledger, 1, 4, 5)
    assert [event.token_ids for event in caller.events] == [[3, 4], [5]]
    ledger.strike()
    send(ledger)
    bring(ledger, 1, 3, 4, 6)
    assert isinstance(caller.events[-1].error, RequestFailedError), "another output than before"


def test_of_many_the_one_that_ends_every_process_is_found() -> None:
    ledger, callers = Ledger(), [Caller() for _ in range(6)]
    for caller in callers:
        ledger.open(caller.request)
    guilty, processes, blamed = 4, 0, None
    while blamed is None:
        processes += 1
        assert processes < 12
        while guilty not in (had := {entry.number for entry in ledger.entries.values() if entry.sent}):
            assert send(ledger) or had
            for number in [entry.number for entry in ledger.entries.values() if entry.sent and entry.number != guilty]:
                if processes > 2:  # before, it dies in its first step
                    bring(ledger, number, 1)
        blamed = ledger.strike()
    assert blamed.number == guilty
    ledger.fail(blamed, RequestFailedError("it")).run()
    for _ in range(5):  # the others that were suspects one by one, then all
        for number in send(ledger):
            bring(ledger, number, 1)
    assert all(entry.sent and entry.strikes == 0 for entry in ledger.entries.values())
    assert len(ledger.entries) == 5


def test_ends_of_the_process_that_no_request_causes_blame_nobody() -> None:
    ledger, callers = Ledger(), [Caller(), Caller()]
    for caller in callers:
        ledger.open(caller.request)
    for _ in range(20):
        for number in send(ledger):
            bring(ledger, number, 5)
        assert ledger.strike() is None
    assert [len(caller.events) for caller in callers] == [20, 20]


def test_aborts_and_failures_end_once_and_count_once() -> None:
    ledger, caller = Ledger(), Caller(n=3)
    ledger.open(caller.request)
    found = ledger.abort(caller.request, 1)
    assert found is not None
    for delivery in found[1]:
        delivery.run()
    found = ledger.abort(caller.request, None)
    assert found is not None
    for delivery in found[1]:
        delivery.run()
    assert sorted(event.index for event in caller.events) == [0, 1, 2]
    assert ledger.abort(caller.request, None) is None
    assert (ledger.waiting, ledger.entries) == (0, {})
    events: list[EmbedEvent] = []
    text = EmbedRequest("e", [1], events.append)
    entry = ledger.open(text)
    assert ledger.waiting == 1
    ledger.fail(entry, EngineClosedError("x")).run()
    assert isinstance(events[0].error, EngineClosedError)
    assert ledger.waiting == 0


def test_errors_cross_as_what_they_are() -> None:
    refused = Problem.of(RequestError("no", "top_k")).error()
    assert (type(refused), str(refused), getattr(refused, "field", None)) == (RequestError, "no", "top_k")
    broken = Problem.of(ModelFileError("short", "a.gguf", "count")).error()
    assert (type(broken), str(broken)) == (ModelFileError, "a.gguf [count]: short")
    assert isinstance(Problem.of(MemoryError("much")).error(), EngineClosedError)
    assert isinstance(Problem("annotations", "an attribute of the module that is no error").error(), EngineClosedError)
