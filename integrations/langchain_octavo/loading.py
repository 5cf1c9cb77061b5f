"""Lets `langchain_core.load.load(..., valid_namespaces=["langchain_octavo"], allowed_objects="all")` make our classes.

LangChain keeps a list of the integrations that it knows of, with no way to enter it but this. A caller still has to
name our namespace: what is loaded can be any model, with any settings, and must be trusted like code.
"""

from __future__ import annotations

from importlib import import_module

from langchain_core.load.serializable import Serializable


def allow_loading(*classes: type[Serializable]) -> None:
    """Enter `classes`. Does nothing where LangChain has no such list."""
    module = import_module("langchain_core.load.load")
    known = getattr(module, "ALL_SERIALIZABLE_MAPPINGS", None)
    if known is None:
        return
    for one in classes:
        path = tuple(one.lc_id())
        known[path] = path
    getattr(module, "_default_class_paths_cache", {}).clear()
