"""Spans of requests, received over HTTP as a collector receives them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from octavo.errors import RequestFailedError
from octavo.outputs import RequestMetrics
from octavo.server.tracing import OtlpTracer
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Span]]]:
    """A place that takes spans, and those that it took."""
    spans: list[Span] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
    server.shutdown()
    server.server_close()
    thread.join()


def attributes(span: Span) -> dict[str, object]:
    found = {}
    for item in span.attributes:
        kind = item.value.WhichOneof("value")
        value = getattr(item.value, kind)
        found[item.key] = [one.string_value for one in value.values] if kind == "array_value" else value
    return found


def test_a_request_is_a_span_below_its_callers(collector: tuple[str, list[Span]]) -> None:
    endpoint, spans = collector
    tracer = OtlpTracer(endpoint)
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    span = tracer.begin("chat.completions", "smol", "chatcmpl-1", {"traceparent": f"00-{trace}-{parent}-01"})
    span.end([RequestMetrics(0.0, 0.1, 0.3, 0.9, 12, 8, 5, 1)], ["stop"])
    tracer.begin("embeddings", "mini", "embd-2", {}).error(RequestFailedError("the prompt was: secret"))
    tracer.close()
    first, second = spans
    assert (first.name, first.trace_id.hex(), first.parent_span_id.hex()) == ("chat smol", trace, parent)
    assert first.kind == Span.SPAN_KIND_SERVER
    assert attributes(first) == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "octavo", "gen_ai.request.model": "smol",
        "gen_ai.response.id": "chatcmpl-1", "gen_ai.usage.input_tokens": 12, "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 8, "gen_ai.response.finish_reasons": ["stop"],
        "octavo.preemptions": 1, "octavo.queue_time": 0.1, "octavo.first_token_time": 0.3,
        "octavo.last_token_time": 0.9,
    }  # fmt: skip
    assert second.status.code == Status.STATUS_CODE_ERROR
    assert attributes(second)["error.type"] == "RequestFailedError"
    assert "secret" not in str(second)
    assert not second.parent_span_id
