"""Every error that lconvert raises on purpose.

A message says what was found, where (file, tensor, key), and what to do about it. The command line turns
these into one line on stderr and the exit code of the class; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class LconvertError(Exception):
    """Base of all intended failures. `exit_code` is what the command line returns for it."""

    exit_code = 2


class InputError(LconvertError):
    """A file is damaged, lies about itself, or holds values that cannot be converted (NaN, overflow)."""


class UnsupportedError(LconvertError):
    """The input is sound but lconvert has no exact way to handle it (architecture, rope type, tokenizer, type)."""


class OptionError(LconvertError):
    """A flag, recipe or argument is wrong or contradicts another one."""


class SpecError(LconvertError):
    """A Model is illegal: a missing or extra entry, a wrong shape, an inconsistent trait."""


class OutputError(LconvertError):
    """The artifact cannot be written: target exists, disk full, read-only folder, source changed meanwhile."""


class MissingPackageError(LconvertError):
    """An optional package is needed for this job and is not installed."""

    exit_code = 3


class RuntimeFailure(LconvertError):
    """A runtime died, hung past its time limit, or broke off in the middle of an answer."""

    exit_code = 1


def meant(word: object, known: Iterable[str]) -> str:
    """`did you mean NAME? ` for a word that is nearly one of `known`, whatever its case; else nothing. In front of the list of them."""
    import difflib

    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), names, 1)
    return f"did you mean {names[close[0]]}? " if close else ""


def few(names: Sequence[str]) -> str:
    """The first three of some names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
