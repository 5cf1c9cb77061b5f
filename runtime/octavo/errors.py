"""Every error Octavo raises on purpose. Each message says what was wrong and what to change.

`OctavoError` is the base; the subclasses also derive from the built-in that people already catch
(`ValueError`, `RuntimeError`, ...), so that code written for other runtimes keeps working.
"""

from __future__ import annotations


class OctavoError(Exception):
    """Base of all errors raised by Octavo."""


class ConfigError(OctavoError, ValueError):
    """An engine argument is out of range, contradictory or not supported. `field` names it."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class RequestError(OctavoError, ValueError):
    """A request is refused before any work: a sampling parameter or a prompt is bad. `field` names it."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ModelFileError(OctavoError, ValueError):
    """A file of a model is missing, truncated or contradicts itself. `file` and `field` name the place."""

    def __init__(self, message: str, file: str | None = None, field: str | None = None) -> None:
        place = " ".join(part for part in (file, f"[{field}]" if field else None) if part)
        super().__init__(f"{place}: {message}" if place else message)
        self.file, self.field = file, field


class UnsupportedModelError(ModelFileError):
    """The architecture, activation or weight format is not implemented (yet)."""


class ModelNotFoundError(OctavoError, FileNotFoundError):
    """No source has this model."""


class DownloadError(OctavoError, OSError):
    """A model could not be fetched: offline, interrupted, corrupt, or the disk is full."""


class QueueFullError(OctavoError, RuntimeError):
    """The engine's waiting queue is at its bound; try again later or raise `max_queued_requests`."""


class EngineClosedError(OctavoError, RuntimeError):
    """The engine was closed, or its loop ended with an error (then the cause is chained)."""


class ForkedEngineError(OctavoError, RuntimeError):
    """An engine was used in a forked child process, where its thread and its locks do not exist."""


class RequestFailedError(OctavoError, RuntimeError):
    """The model failed while it ran this request; other requests are not affected. The cause is chained."""


class DeviceLostError(OctavoError, RuntimeError):
    """The device cannot go on in this process; the cause is chained. A server replaces its engine's process."""
