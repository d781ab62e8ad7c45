"""How questions are asked: in turn through the families, never the same twice, yes and no in balance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .draw import Dice, union
from .types import Question, Thing
from .vocabulary import TEMPLATES

Maker = Callable[[], Question | None]
YES_NO = ("yes", "no")
COUNTS = tuple("012345678")


def article(name: str) -> str:
    """The indefinite article before a name."""
    return "an" if name[0] in "aeiou" else "a"


class Asker:
    """Writes questions about one picture of side ``size``."""

    def __init__(self, dice: Dice, size: int) -> None:
        self.dice = dice
        self.size = size
        self._turns: dict[str, bool] = {}

    def there_is(self, x: str) -> str:
        """ "is there a .." with the right article."""
        return self.phrase("exists", f"{article(x)} {x}")

    def phrase(self, template: str, x: str = "", y: str = "") -> str:
        """One phrasing of a template with its blanks filled in."""
        forms = TEMPLATES[template]
        form = forms[0] if len(forms) == 1 else self.dice.pick(forms)
        return form.replace("{x}", x).replace("{y}", y)

    def ask(
        self, family: str, text: str, answer: str, things: Sequence[Thing] = (), choices: tuple[str, ...] = ()
    ) -> Question:
        """A question whose evidence is the union of the things, or the whole picture when there are none."""
        return Question(family, text, answer, union([thing.mask for thing in things], self.size), choices)

    def wanted(self, family: str) -> bool:
        """Which answer a yes/no question should have: a coin for the first of a family in a picture, then in turn.

        Independent coins would lean to "no": the few things that can get a "yes" are soon all asked about.
        """
        return self._turns.setdefault(family, self.dice.chance(0.5))

    def yes_no(self, family: str, text: str, answer: bool, things: Sequence[Thing]) -> Question:
        """A yes/no question; existence: evidence of a "no" is the whole picture, so pass no things."""
        return self.ask(family, text, "yes" if answer else "no", things, YES_NO)

    def count(self, text: str, things: Sequence[Thing]) -> Question:
        """A counting question whose answer is the number of things."""
        return self.ask("counting", text, str(len(things)), things, COUNTS)

    def collect(self, n: int, makers: Sequence[Maker]) -> tuple[Question, ...]:
        """n different questions, the makers used in turn, starting anywhere. A maker gives None where it cannot ask."""
        found: list[Question] = []
        texts: set[str] = set()
        order = self.dice.shuffled(makers)
        for attempt in range(40 * n):
            if len(found) == n:
                break
            question = order[attempt % len(order)]()
            if question is not None and question.text not in texts:
                texts.add(question.text)
                found.append(question)
                if question.choices == YES_NO:
                    self._turns[question.family] = question.answer == "no"
        return tuple(found)
