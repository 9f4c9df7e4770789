"""Stop strings in a stream: found wherever the stream is cut, and never shown, not even in part."""

from __future__ import annotations

from collections.abc import Sequence

from llmkit.errors import UsageError


class StopScanner:
    """Passes text on until a stop string is complete, and holds back what may still become one.

    Of several stop strings the one that begins first in the text wins; everything from its beginning on is dropped.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not isinstance(stop, str) or not stop for stop in stops):
            raise UsageError(f"Stop strings {list(stops)!r} hold one that is empty or no text; leave it out.")
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is safe to show, whether a stop string was met); after a stop nothing more comes out."""
        if self.stopped:
            return "", True
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        first_open = self._first_open()
        # A stop that is complete has not won while one that began before it may still be completed.
        if found and min(found) <= first_open:
            shown, self._held, self.stopped = self._held[: min(found)], "", True
            return shown, True
        shown, self._held = self._held[:first_open], self._held[first_open:]
        return shown, False

    def flush(self) -> str:
        """The text held back, once no more is to come; a stop string in it still ends it."""
        held, self._held = self._held, ""
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found and not self.stopped:
            self.stopped = True
            return held[: min(found)]
        return held

    def _first_open(self) -> int:
        """Where the text begins to be a proper prefix of a stop string; its length if nowhere."""
        for at in range(max(0, len(self._held) - self._longest + 1), len(self._held)):
            tail = self._held[at:]
            if any(stop.startswith(tail) and len(stop) > len(tail) for stop in self._stops):
                return at
        return len(self._held)
