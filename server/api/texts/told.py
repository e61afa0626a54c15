"""What the text of an answer turned out to be, until it is asked for."""

from server.api.texts.speech import CallPiece, Said


class Told:
    """White space beside a call is between the call and the text, and part of neither: it is not told. Texts on both
    sides of it are lines of their own."""

    def __init__(self, with_calls: bool) -> None:
        self.is_reasoning = False
        self.num_calls = 0
        self.with_calls = with_calls
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[CallPiece] = []
        self._space: list[str] = []  # at the end of what was told as content
        self._has_content = self._is_behind_call = False
        self._has_arguments = False

    def content(self, text: str) -> None:
        if not self.with_calls:
            self._content.append(text)
            return
        if self._is_behind_call:
            text = text.lstrip()
        stripped = text.rstrip()
        if stripped:
            between = ["\n"] if self._is_behind_call and self._has_content else self._space
            self._content += [*between, stripped]
            self._space, self._is_behind_call, self._has_content = [], False, True
        if not self._is_behind_call and len(stripped) < len(text):
            self._space.append(text[len(stripped) :])

    def reasoning(self, text: str) -> None:
        self._reasoning.append(text)

    def begin_call(self, name: str) -> None:
        self._space, self._is_behind_call, self._has_arguments = [], True, False
        self._calls.append(CallPiece(self.num_calls, name, ""))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """Some of the last call's, as JSON."""
        if text:
            self._has_arguments = True
            self._calls.append(CallPiece(self.num_calls - 1, None, text))

    def end_call(self) -> None:
        if not self._has_arguments:
            self.arguments("{}")

    def end(self) -> None:
        self._content += self._space
        self._space = []

    def take(self) -> Said:
        """All that was not taken yet."""
        if not (self._content or self._reasoning or self._calls):
            return Said()
        said = Said("".join(self._content), "".join(self._reasoning), self._joined())
        self._content, self._reasoning, self._calls = [], [], []
        return said

    def _joined(self) -> list[CallPiece]:
        """One piece for each call, however many it came in."""
        pieces: dict[int, list[CallPiece]] = {}
        for it in self._calls:
            pieces.setdefault(it.index, []).append(it)
        return [CallPiece(index, its[0].name, "".join(it.arguments for it in its)) for index, its in pieces.items()]
