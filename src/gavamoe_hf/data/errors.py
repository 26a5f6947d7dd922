"""The one error of the data code, and how it words a problem that several rows share."""

from collections.abc import Sequence
from typing import Any

_ROWS_SHOWN = 3
_VALUE_WIDTH = 60


class DataError(ValueError):
    """
    Raised where records cannot be used as they are: the message names the file or split, the rows and the
    column, and says what was expected, what was found and what to do.
    """


def show_value(value: Any) -> str:
    """
    Write a value for an error message, cut to a readable width.

    Args:
        value (`Any`): The value found in the data; `None` reads as a missing value.

    Returns:
        `str`: The text that stands for it.
    """
    if value is None:
        return "nothing (null)"
    text = repr(value)
    return text if len(text) <= _VALUE_WIDTH else text[: _VALUE_WIDTH - 3] + "..."


def show_rows(found: Sequence[tuple[int, str]], total: int, unit: str = "row") -> str:
    """
    Word the rows that share a problem: the first few, and how many there are.

    Args:
        found (`Sequence[tuple[int, str]]`): The number of each row, counted from 1, and what was found there.
            Only the first few are read.
        total (`int`): How many rows share the problem.
        unit (`str`, defaults to `"row"`): What the number counts: `"row"` or `"line"`.

    Returns:
        `str`: Such as `"6.0 in row 3, nan in row 9 (2 rows in all)"`.
    """
    shown = ", ".join(f"{value} in {unit} {number}" for number, value in found[:_ROWS_SHOWN])
    if total == 1:
        return shown
    first = f"the first {_ROWS_SHOWN} of {total} {unit}s" if total > _ROWS_SHOWN else f"{total} {unit}s in all"
    return f"{shown} ({first})"


def show_names(names: Sequence[str], limit: int = 5) -> str:
    """
    Write a list of names for an error message, cut after the first few.

    Args:
        names (`Sequence[str]`): The names.
        limit (`int`, defaults to 5): How many to write before the rest is only counted.

    Returns:
        `str`: Such as `"'a', 'b' and 3 more"`, or `"none"`.
    """
    if not names:
        return "none"
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
