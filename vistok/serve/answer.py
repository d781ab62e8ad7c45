"""The text of an answer, said piece by piece while its tokens are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Text of token ids that come one by one. ``decode``: what several of them say together.

    A token may be a part of a character, and what it says may depend on the one before it. So a piece is what the text
    of the last tokens has grown by, and is held back while that text ends in half a character. All pieces joined are
    the text of all tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._said = 0

    def add(self, token: int) -> str:
        """What can be said after ``token`` that could not before."""
        self._ids.append(token)
        piece = self._piece()
        if not piece or piece.endswith(_HALF):
            return ""
        # The tokens of this piece stay, as what the next one follows.
        self._ids, self._said = self._ids[self._said :], len(self._ids) - self._said
        return piece

    def rest(self) -> str:
        """What was held back, when no token comes any more."""
        return self._piece()

    def _piece(self) -> str:
        return self._decode(self._ids)[len(self._decode(self._ids[: self._said])) :]


class Answer:
    """An answer without white space around it, which ends before the first of the strings ``stop``.

    ``stop``: not empty ones. Of two that end at the same character the longer one counts. What may turn out to be the
    beginning of one is held back, so how the text is cut into tokens makes no difference.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        """Whether one of ``stop`` was met."""
        self._words, self._stop = Detokenizer(decode), tuple(stop)
        self._held, self._begun = "", False

    def add(self, token: int) -> str:
        """What can be said after ``token`` that could not before."""
        return self._say(self._words.add(token))

    def rest(self) -> str:
        """What was held back, when no token comes any more."""
        said = "" if self.stopped else self._say(self._words.rest())
        return said if self.stopped else said + self._release(len(self._held))

    def _say(self, piece: str) -> str:
        self._held += piece
        met = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if met:
            self.stopped = True
            return self._release(min(met)[1])
        return self._release(len(self._held) - max((self._beginning(stop) for stop in self._stop), default=0))

    def _beginning(self, stop: str) -> int:
        """With how many characters of ``stop`` the text that is held ends."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)

    def _release(self, length: int) -> str:
        """Say the first ``length`` characters of what is held, but not yet the white space at their end."""
        said = self._held[:length].rstrip()
        self._held = self._held[len(said) :]
        if not self._begun:
            said = said.lstrip()
            self._begun = bool(said)
        return said
