"""What can go wrong at the door."""

from __future__ import annotations


class DoorError(RuntimeError):
    """The other interpreter's process did not do its part; the message has its last output and what to look at."""


class RemoteError(RuntimeError):
    """The adapter raised in the other interpreter. Attributes: `type_name`, `message`, `traceback_text`."""

    def __init__(self, type_name: str, message: str, traceback_text: str = ""):
        self.type_name, self.message, self.traceback_text = type_name, message, traceback_text
        super().__init__(
            f"{type_name}: {message}" + (f"\n--- in the other interpreter\n{traceback_text.rstrip()}" if traceback_text else "")
        )

    def __reduce__(self):
        return type(self), (self.type_name, self.message, self.traceback_text)
