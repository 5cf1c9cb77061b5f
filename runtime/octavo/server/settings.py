"""`ServerSettings`: how the server behaves, apart from its models. Made by `octavo serve`, read by `app` and below."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of one server. Raises `ConfigError`."""

    api_keys: tuple[str, ...] = ()
    """Any of them opens every path; none: no key is asked for. Each has a prefix cache of its own."""
    allow_request_templates: bool = False
    """Let a request bring a chat template: code, if in a sandbox, and a way to see what the model is told."""
    max_body_bytes: int = 16 << 20
    """Of a request's body: more is refused without being read."""
    body_seconds: float = 30.0
    """For a request's body to come."""
    write_seconds: float = 60.0
    """For a client to take what is sent to it; then its request ends."""

    def __post_init__(self) -> None:
        for key in self.api_keys:
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError("an API key must be printable ASCII without blanks, and not empty", "api_key")
        for name in ("max_body_bytes", "body_seconds", "write_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)!r}", name)
