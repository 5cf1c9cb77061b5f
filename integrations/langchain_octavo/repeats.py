"""Tool calls that repeat themselves. A small model that has made its call often makes it again, and again."""

from __future__ import annotations

from octavo.chat import Delta, ParsedMessage, ToolCallDelta


class Repeats:
    """Lets the deltas of an answer pass up to the first call that has the name and arguments of an earlier one; there
    the answer is over. A call is held back while it may be such a one."""

    def __init__(self) -> None:
        self.over = False
        self._calls: list[tuple[str, str]] = []
        """Name and arguments so far of each call."""
        self._held: list[Delta] = []

    def pass_on(self, deltas: list[Delta]) -> list[Delta]:
        """What may be seen of `deltas`, and of those held back."""
        passed: list[Delta] = []
        for delta in deltas:
            if self.over:
                break
            held, self._held = self._held, []
            if isinstance(delta, ToolCallDelta):
                state = self._compare(delta)
                if state == "same":
                    self.over = True
                    self._calls.pop()
                    break
                if state == "alike":
                    self._held = [*held, delta]
                    continue
            passed += [*held, delta]
        return passed

    def _compare(self, delta: ToolCallDelta) -> str:
        """The call of `delta` beside the earlier ones of its name."""
        if delta.index == len(self._calls):
            self._calls.append((delta.name or "", ""))
        name, arguments = self._calls[delta.index]
        arguments += delta.arguments
        self._calls[delta.index] = (name, arguments)
        earlier = [other for known, other in self._calls[: delta.index] if known == name]
        if arguments and arguments in earlier:
            return "same"
        return "alike" if any(other.startswith(arguments) for other in earlier) else "different"

    def cut(self, message: ParsedMessage) -> ParsedMessage:
        """`message` without what did not pass."""
        if not self.over:
            return message
        return ParsedMessage(message.content, message.reasoning, message.tool_calls[: len(self._calls)])
