"""What is told in one line and without a traceback: wrong input, and a run that cannot go on. All else is our mistake."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Wrong input from the user: one line that names the wrong value and what is allowed.

    The scripts print it on stderr without a traceback and leave with exit code 2.
    """


class RunError(RuntimeError):
    """A run that cannot go on, through no fault of the input: a full disk, a loss that is not finite.

    The scripts print it on stderr without a traceback and leave with exit code 1.
    """


def nearest(word: str, allowed: Iterable[str]) -> str:
    """A suggestion to append to an error, ``"; did you mean 'cosine'?"``, or ``""`` where nothing is near."""
    match = difflib.get_close_matches(str(word), [str(a) for a in allowed], n=1)
    return f"; did you mean {match[0]!r}?" if match and match[0] != word else ""
