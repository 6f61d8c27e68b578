"""Numbers with the word for what they count."""

from __future__ import annotations

__all__ = ["counted"]


def counted(number: int, one: str, many: str | None = None) -> str:
    """The number and its word.

    Args:
        number: of things.
        one: the word for one of them.
        many: the word for several, if it is not that with an ``s``.

    >>> counted(1, "process", "processes"), counted(0, "library", "libraries"), counted(2, "load")
    ('1 process', '0 libraries', '2 loads')
    """
    return f"{number} {one if number == 1 else many or one + 's'}"
