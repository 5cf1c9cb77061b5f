"""`with_structured_output`: a chat model bound to a schema, and a parser of what it says."""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.base import OutputParserLike
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema
from octavo.chat import closed
from octavo.errors import RequestError

from langchain_octavo.schemas import is_pydantic, json_schema, name_of

if TYPE_CHECKING:
    from langchain_octavo.chat_models import ChatOctavo

METHODS = ("json_schema", "function_calling", "json_mode")


def structured_output(
    chat: ChatOctavo, schema: Any, method: str, *, include_raw: bool, strict: bool | None, kwargs: dict[str, Any]
) -> Runnable[LanguageModelInput, Any]:
    """See `ChatOctavo.with_structured_output`."""
    if method not in METHODS:
        raise RequestError(f"method must be one of {', '.join(METHODS)}, not {method!r}", "method")
    if schema is None and method != "json_mode":
        raise RequestError(f"method {method!r} needs a schema: only 'json_mode' does without", "schema")
    parser: OutputParserLike[Any]
    if schema is None:
        llm: Runnable[LanguageModelInput, Any] = chat.bind(response_format={"type": "json_object"}, **kwargs)
        parser = JsonOutputParser()
    else:
        whole = json_schema(schema)
        whole = whole if strict is False else closed(whole)
        traced = _traced(schema, method, strict)
        if method == "function_calling":
            llm, parser = _by_tool(chat, schema, whole, {**traced, **kwargs})
        else:
            form = {"type": "json_schema", "json_schema": {"name": name_of(schema), "schema": whole}}
            llm = chat.bind(response_format=form, **traced, **kwargs)
            parser = PydanticOutputParser(pydantic_object=schema) if is_pydantic(schema) else JsonOutputParser()
    if not include_raw:
        return llm | parser
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=llm) | parsed.with_fallbacks([failed], exception_key="parsing_error")


def _by_tool(
    chat: ChatOctavo, schema: Any, whole: dict[str, Any], bound: dict[str, Any]
) -> tuple[Runnable[LanguageModelInput, Any], OutputParserLike[Any]]:
    name = name_of(schema)
    function = {"name": name, "description": whole.get("description", ""), "parameters": {"type": "object", **whole}}
    tool = {"type": "function", "function": function}
    llm = chat.bind(tools=[tool], tool_choice=name, parallel_tool_calls=False, **bound)
    if is_pydantic(schema):
        return llm, PydanticToolsParser(tools=[schema], first_tool_only=True)
    return llm, JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)


def _traced(schema: Any, method: str, strict: bool | None) -> dict[str, Any]:
    """What LangChain shows in traces of the form; it knows fewer schemas than we do."""
    try:
        convert_to_json_schema(schema)
    except Exception:
        return {}
    described = {"method": method} if strict is None else {"method": method, "strict": strict}
    return {"ls_structured_output_format": {"kwargs": described, "schema": schema}}
