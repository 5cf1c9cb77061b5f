"""Traces by OpenTelemetry, for operators who ask for them (`octavo serve --otlp-endpoint URL`, extra `otel`). A span is
one request, named and described by the conventions for generative AI [1], a child of the caller's if the request says
so in its `traceparent`. Prompts and outputs are not in it.

[1] https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.outputs import RequestMetrics

OPERATIONS = {
    "chat.completions": "chat", "responses": "chat", "completions": "text_completion", "embeddings": "embeddings",
}  # fmt: skip
"""What the conventions call that which an endpoint does."""


class Span(Protocol):
    """Of one request. One of the two is called, once."""

    def end(self, metrics: Sequence[RequestMetrics], reasons: Sequence[str]) -> None:
        """`metrics` of each prompt, `reasons` of each output."""

    def error(self, error: BaseException) -> None: ...


class Tracer(Protocol):
    def begin(self, endpoint: str, model: str, request_id: str, headers: Mapping[str, str]) -> Span:
        """A request has arrived."""

    def close(self) -> None:
        """Send what is still to be sent."""


class NoTracer:
    """Where nobody asked for traces; its own span too."""

    def begin(self, endpoint: str, model: str, request_id: str, headers: Mapping[str, str]) -> Span:
        return self

    def end(self, metrics: Sequence[RequestMetrics], reasons: Sequence[str]) -> None:
        pass

    def error(self, error: BaseException) -> None:
        pass

    def close(self) -> None:
        pass


class OtlpTracer:
    """Sends spans to a collector by OTLP over HTTP, in batches on a thread of its own. `endpoint`: with its path, such
    as http://localhost:4318/v1/traces. Raises `ConfigError` where OpenTelemetry is not installed."""

    def __init__(self, endpoint: str, service: str = "octavo") -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise ConfigError("traces need OpenTelemetry: pip install 'octavo[otel]'", "otlp_endpoint") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("octavo.server")

    def begin(self, endpoint: str, model: str, request_id: str, headers: Mapping[str, str]) -> Span:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        operation = OPERATIONS.get(endpoint, endpoint)
        attributes = {
            "gen_ai.operation.name": operation, "gen_ai.provider.name": "octavo", "gen_ai.request.model": model,
            "gen_ai.response.id": request_id,
        }  # fmt: skip
        context = TraceContextTextMapPropagator().extract(headers)
        return _OtlpSpan(
            self._tracer.start_span(f"{operation} {model}", context, SpanKind.SERVER, attributes=attributes)
        )

    def close(self) -> None:
        self._provider.shutdown()


class _OtlpSpan:
    def __init__(self, span: Any) -> None:
        self._span = span

    def end(self, metrics: Sequence[RequestMetrics], reasons: Sequence[str]) -> None:
        self._span.set_attributes({
            "gen_ai.usage.input_tokens": sum(one.prompt_tokens for one in metrics),
            "gen_ai.usage.output_tokens": sum(one.output_tokens for one in metrics),
            "gen_ai.usage.cache_read.input_tokens": sum(one.cached_tokens for one in metrics),
            "gen_ai.response.finish_reasons": list(reasons),
            "octavo.preemptions": sum(one.preemptions for one in metrics),
        })  # fmt: skip
        for name in ("queue_time", "first_token_time", "last_token_time"):
            seconds = [getattr(one, name) for one in metrics if getattr(one, name) is not None]
            if seconds:
                self._span.set_attribute(f"octavo.{name}", max(seconds))
        self._span.end()

    def error(self, error: BaseException) -> None:
        from opentelemetry.trace import Status, StatusCode

        # the name alone: a message may quote the prompt
        self._span.set_attribute("error.type", type(error).__name__)
        self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()
