"""What an answer says about itself, in LangChain's words: usage, finish reason, timings, log-probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from octavo.outputs import RequestMetrics, TokenLogprobs
from octavo.tokenizer import Tokenizer

PROVIDER = "octavo"


def usage(metrics: RequestMetrics) -> UsageMetadata:
    """Tokens of a request; `cache_read` are those of the prompt that the prefix cache had."""
    return UsageMetadata(
        input_tokens=metrics.prompt_tokens,
        output_tokens=metrics.output_tokens,
        total_tokens=metrics.prompt_tokens + metrics.output_tokens,
        input_token_details=InputTokenDetails(cache_read=metrics.cached_tokens),
    )


def figures(metrics: RequestMetrics) -> dict[str, float]:
    """`time_to_first_token` in seconds and `tokens_per_second` after it, as far as there are any."""
    found: dict[str, float] = {}
    if metrics.first_token_time is not None:
        found["time_to_first_token"] = metrics.first_token_time
    per_token = metrics.time_per_token
    if per_token:
        found["tokens_per_second"] = 1 / per_token
    return found


def answer_info(
    model: str, finish_reason: str | None, stop_reason: int | str | None, metrics: RequestMetrics
) -> dict[str, Any]:
    """What becomes `response_metadata` of a message and `generation_info` of a generation."""
    found: dict[str, Any] = {"model_name": model, "model_provider": PROVIDER, "finish_reason": finish_reason}
    if stop_reason is not None:
        found["stop_reason"] = stop_reason
    return {**found, **figures(metrics)}


def logprobs(tokenizer: Tokenizer, token_ids: Sequence[int], given: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Log-probabilities in OpenAI's form: {"content": [{"token", "bytes", "logprob", "top_logprobs"}]}."""
    return {
        "content": [
            {
                **_token(tokenizer, chosen, ranked[chosen].logprob),
                "top_logprobs": [_token(tokenizer, token, one.logprob) for token, one in ranked.items()],
            }
            for chosen, ranked in zip(token_ids, given, strict=False)
        ]
    }


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token), "bytes": list(tokenizer.token_bytes(token)), "logprob": logprob
    }  # fmt: skip


def llm_output(model: str, metrics: Iterable[RequestMetrics]) -> dict[str, Any]:
    """Of a whole call: the model and the sum of the tokens, under the names that LangChain's counters read."""
    found = list(metrics)
    prompt, completion = sum(one.prompt_tokens for one in found), sum(one.output_tokens for one in found)
    return {"model_name": model, "token_usage": _token_usage(prompt, completion)}


def combined(outputs: Iterable[Mapping[str, Any] | None]) -> dict[str, Any]:
    """One `llm_output` of several; None for an answer that came from a cache."""
    found = [output for output in outputs if output]
    if not found:
        return {}
    uses = [output.get("token_usage") or {} for output in found]
    prompt = sum(use.get("prompt_tokens", 0) for use in uses)
    completion = sum(use.get("completion_tokens", 0) for use in uses)
    return {"model_name": found[0].get("model_name"), "token_usage": _token_usage(prompt, completion)}


def _token_usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
