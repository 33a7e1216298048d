"""What the documentation makes of the package's source: blocks of code, and defaults in figures.

An extension of griffe, which reads the source for mkdocs. Markdown would take the ``>>>`` of a
doctest for a quotation and a bracket in its result for a link.
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
    """Puts fences into all docstrings, and values in the place of defaults taken from elsewhere."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Called for every class: as a default, ``LinearSpec.surrogate`` becomes "clip"."""
        for parameter in cls.parameters:
            path = getattr(parameter.default, "canonical_path", "")
            if isinstance(parameter.default, griffe.ExprAttribute) and path.startswith("maqd_hf."):
                parameter.default = cls.modules_collection[path].value
