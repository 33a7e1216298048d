"""What the documentation makes of the package's docstrings: doctests and tables as blocks of code.

An extension of griffe, which reads the docstrings for mkdocs; Markdown would take ``>>>`` for a
quotation and a bracket in the result of a doctest for a link.
"""

from __future__ import annotations

from typing import Any

import griffe


def fenced(text: str) -> str:
    """``text`` with every doctest, and every table ruled with equals signs, in a fence.

    A doctest ends with its paragraph; a table with its third rule, or its paragraph's end.
    """
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        first = paragraph.lstrip().partition("\n")[0]
        kind = "pycon" if first.startswith(">>>") else "text" if first.startswith("===") else ""
        indent = paragraph[: len(paragraph) - len(paragraph.lstrip())]
        lines.append(f"{indent}```{kind}\n{paragraph.rstrip()}\n{indent}```" if kind else paragraph)
    return "\n\n".join(lines)


class Docstrings(griffe.Extension):
    """Fences in all docstrings."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
