"""Words that messages share: names that are close, numbers of things, names of files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

SHOWN = 5
"""Names of a list that a message shows."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a sentence that names the closest names, or nothing if none is close.

    Capitals count for nothing, and letters in another order are close.

    Example:
        >>> nearest("um", ["mu", "lr"]).strip()
        'Did you mean mu?'
    """
    wrong = name.lower()
    known: dict[str, list[str]] = {}
    for each in sorted(names):
        known.setdefault(each.lower(), []).append(each)
    close = get_close_matches(wrong, known, n=3, cutoff=0.6)
    close += [each for each in known if sorted(each) == sorted(wrong) and each not in close]
    matches = [each for lower in close for each in known[lower]]
    return f"\nDid you mean {' or '.join(matches)}?" if matches else ""


def some(names: Sequence[str]) -> str:
    """Return the first names of a list."""
    return ", ".join(map(readable, names[:SHOWN])) + ", ..." * (len(names) > SHOWN)


def counted(number: int, one: str, several: str | None = None) -> str:
    """Return a number of things, as one says it.

    Example:
        >>> counted(1, "image"), counted(1_200, "class", "classes")
        ('1 image', '1,200 classes')
    """
    return f"{number:,} {one if number == 1 else several or f'{one}s'}"


def readable(name: str) -> str:
    r"""Return a file's name on one line of text that can be printed.

    Example:
        >>> print(readable("a\nb"))
        a\nb
    """
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in name)
