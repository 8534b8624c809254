"""Writes tests/corpus: a small text of the project's own for regression runs, which versions of
Python and torch do not move. Run once; the files are committed.

    python tests/make_corpus.py

Each document has names of its own that come back throughout, so that a longer context helps.
"""

from __future__ import annotations

import random
from pathlib import Path

ROOT = Path(__file__).parent / "corpus"
NUM_DOCUMENTS, DOCUMENT_BYTES = 12, 9_000  # of each kind


def words(text: str) -> list[str]:
    """The words of a line."""
    return text.split()


SYLLABLES = words("ba bel cor dan del el fen gar hol is ka lin mar nor ol pen quil ros sil tam ul ven wy zan")
GOODS = words("barley copper glass honey iron lamp oil paper rope salt silver timber tin wax wool")
SEASONS = ["early spring", "midsummer", "harvest time", "late autumn", "the first frost", "deep winter"]
PLACES = words("bridge gate harbour hill market mill quay square tower well")
VERBS = words("counted carried weighed sold bought stored repaired traded unloaded promised")
NOUNS = words("batch buffer count cursor entry index item limit offset page record row score table value")
ACTIONS = words("append check clear collect compare merge move read reset scan shift sort split update write")


def word(rng: random.Random, num_syllables: int) -> str:
    """A made-up name."""
    return "".join(rng.choice(SYLLABLES) for _ in range(num_syllables))


def story(rng: random.Random) -> str:
    """Plain prose: the log of a small port."""
    people = [word(rng, rng.choice((2, 3))).capitalize() for _ in range(4)]
    town, ships = word(rng, 3).capitalize(), [word(rng, 2).capitalize() for _ in range(2)]
    goods, places = rng.sample(GOODS, 5), rng.sample(PLACES, 4)
    lines = [f"The Port of {town}", ""]
    while sum(len(line) + 1 for line in lines) < DOCUMENT_BYTES:
        paragraph = [f"In {rng.choice(SEASONS)} the {rng.choice(ships)} lay at the {rng.choice(places)}."]
        for _ in range(rng.randint(3, 6)):
            person, other = rng.sample(people, 2)
            good, place, number = rng.choice(goods), rng.choice(places), rng.randint(2, 90)
            paragraph.append(
                rng.choice(
                    (
                        f"{person} {rng.choice(VERBS)} {number} loads of {good} near the {place}.",
                        f"{person} told {other} that the {good} of {town} was the best they had seen.",
                        f"Nobody at the {place} had asked {person} where the {good} came from.",
                        f'"Bring the {good} to the {place}," said {person}, and {other} did so.',
                        f"By evening {number} sacks of {good} stood by the {place}, and {other} went home.",
                    )
                )
            )
        lines += [*paragraph, ""]
    return "\n".join(lines) + "\n"


def program(rng: random.Random) -> str:
    """Text in the shape of source code; it is never run."""
    module, nouns = word(rng, 2), rng.sample(NOUNS, 6)
    fields, constant = rng.sample(nouns, 3), word(rng, 2).upper()
    lines = [f'"""Helpers for the {module} tables."""', "", f"{constant} = {rng.randint(2, 900)}", "", ""]
    lines += [f"class {module.capitalize()}:", f"    def __init__(self, {', '.join(fields)}):"]
    lines += [f"        self.{name} = {name}" for name in fields]
    while sum(len(line) + 1 for line in lines) < DOCUMENT_BYTES:
        action, noun, field = rng.choice(ACTIONS), rng.choice(nouns), rng.choice(fields)
        lines += ["", f"    def {action}_{noun}(self, {noun}, step={rng.randint(1, 9)}):"]
        lines += [f'        """The {noun} after one {action} of self.{field}."""']
        for _ in range(rng.randint(2, 4)):
            lines += rng.choice(
                (
                    [f"        if {noun} > {constant}:", f"            return self.{field}"],
                    [f"        for {nouns[0]} in range({noun}):", f"            self.{field} += step"],
                    [f"        # The {noun} never passes {constant} here.", f"        {noun} -= step"],
                    [f"        self.{field} = {module}_{action}({noun}, step)"],
                )
            )
        lines += [f"        return {noun}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    # With these names, whose hash decides the split, each split has documents of both kinds.
    for folder, name, make in (("stories", "story", story), ("programs", "program", program)):
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        for number in range(NUM_DOCUMENTS):
            text = make(random.Random(f"{name}/{number}"))
            (ROOT / folder / f"{name}_{number:02d}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
