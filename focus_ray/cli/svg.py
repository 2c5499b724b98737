"""SVG elements as text. Any string may go in; what XML cannot hold is spelt out."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr


def element(name: str, *children: str, **attributes: str | float) -> str:
    """``<name ...>children</name>``.

    Args:
        children: elements, or words that went through ``words``.
        attributes: ``_`` stands for ``-``, and a final one is dropped, as in ``class_``; numbers
            are in pixels and written with at most two decimals.
    """
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}={quoteattr(_value(value))}"
        for key, value in attributes.items()
    )
    return f"<{name}{given}>{''.join(children)}</{name}>" if children else f"<{name}{given}/>"


def words(text: str) -> str:
    """``text`` as the content of an element."""
    return escape(printable(text))


def printable(text: str) -> str:
    r"""``text`` with everything unprintable as in a literal: ``\n``, ``\x00``, ``\u202e``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _value(value: str | float) -> str:
    return printable(value) if isinstance(value, str) else f"{round(value, 2):g}"
