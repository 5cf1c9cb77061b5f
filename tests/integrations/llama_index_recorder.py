"""`recorded`: everything that LlamaIndex tells its observers while a block runs. For the contract suites here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llama_index.core.callbacks import CallbackManager, CBEventType
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler


class Calls:
    """Payloads of callbacks, instrumentation events and the names of spans, in the order in which they came."""

    def __init__(self) -> None:
        self.started: list[dict[Any, Any]] = []
        self.ended: list[dict[Any, Any]] = []
        self.events: list[Any] = []
        self.spans: list[str] = []

    def named(self, name: str) -> list[Any]:
        return [event for event in self.events if type(event).__name__ == name]

    def expect(self, kind: str, *, pieces: int, span: str) -> None:
        """One call: one start, one end, `pieces` events between them, one span, and no call inside another."""
        names = [type(event).__name__ for event in self.events if type(event).__name__ != "SpanDropEvent"]
        assert names == [f"{kind}StartEvent", *[f"{kind}InProgressEvent"] * pieces, f"{kind}EndEvent"]
        assert len(self.started) == len(self.ended) == 1
        assert [name.split("-")[0].split(".")[-1] for name in self.spans] == [span]
        assert {event.span_id for event in self.events} == set(self.spans)


class _Callbacks(BaseCallbackHandler):
    def __init__(self, calls: Calls) -> None:
        super().__init__([], [])
        self._calls = calls

    def on_event_start(self, event_type: CBEventType, payload: Any = None, *_: Any, **__: Any) -> str:
        if event_type == CBEventType.LLM:
            self._calls.started.append(payload)
        return ""

    def on_event_end(self, event_type: CBEventType, payload: Any = None, *_: Any, **__: Any) -> None:
        if event_type == CBEventType.LLM:
            self._calls.ended.append(payload)

    def start_trace(self, trace_id: str | None = None) -> None: ...

    def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None: ...


class _Events(BaseEventHandler):
    calls: Any

    def handle(self, event: Any, **_: Any) -> None:
        self.calls.events.append(event)


class _Spans(SimpleSpanHandler):
    calls: Any = None

    def new_span(self, id_: str, *args: Any, **kwargs: Any) -> Any:
        self.calls.spans.append(id_)
        return super().new_span(id_, *args, **kwargs)


@contextmanager
def recorded(llm: Any) -> Iterator[Calls]:
    calls = Calls()
    root = get_dispatcher()
    events, spans = _Events(calls=calls), _Spans()
    spans.calls = calls
    before, llm.callback_manager = llm.callback_manager, CallbackManager([_Callbacks(calls)])
    root.add_event_handler(events)
    root.add_span_handler(spans)
    try:
        yield calls
    finally:
        root.event_handlers.remove(events)
        root.span_handlers.remove(spans)
        llm.callback_manager = before
