"""What a conversion did, for people and for JSON."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from .size import ModelSize

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def collapse(names: list[str]) -> list[str]:
    """Merge names that differ in layer numbers only.

    >>> collapse(["layers.0.up", "layers.1.up", "layers.2.up", "head"])
    ['layers.{0-2}.up', 'head']
    """
    groups: dict[str, list[int]] = {}
    for name in names:
        numbers = _NUMBER.findall(name)
        groups.setdefault(_NUMBER.sub("{}", name, count=1), []).extend(map(int, numbers[:1]))
    return [
        pattern.replace("{}", "{" + _ranges(sorted(numbers)) + "}") if numbers else pattern
        for pattern, numbers in groups.items()
    ]


def _ranges(numbers: list[int]) -> str:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


@dataclass
class ConversionReport:
    """Result of ``quantize_model`` and ``pack_model``; ``str(report)`` is the readable form.

    Every mapping goes from full module names to a few words. ``size`` says what the packed model
    takes, ``untraced`` why no forward of the model was seen, if so: a layer whose weight the model
    reads by itself, instead of calling the layer, would then go unnoticed.
    """

    state: str
    linears: dict[str, str] = field(default_factory=dict)
    embeddings: dict[str, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    not_absorbed: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    size: ModelSize | None = None
    untraced: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over the whole packed model."""
        return self.size.bits_per_weight if self.size else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"bits_per_weight": self.bits_per_weight}

    def __str__(self) -> str:
        lines = [f"MaQD {self.state} model"]
        if self.untraced:
            lines.append(f"  {self.untraced}: weights it reads past their layers go unnoticed")
        for title, table in (
            ("layers", self.linears),
            ("embeddings", self.embeddings),
            ("norms", self.norms),
            ("affine kept in the norm", self.not_absorbed),
            ("left as they were", self.kept),
        ):
            lines += _section(title, table)
        if self.size is not None:
            lines.append(self.size.table())
        return "\n".join(lines)


def _section(title: str, table: dict[str, str]) -> list[str]:
    by_text: dict[str, list[str]] = {}
    for name, text in table.items():
        by_text.setdefault(text, []).append(name)
    lines = [f"  {title}: {len(table)}"] if table else []
    for text, names in by_text.items():
        shown = collapse(names)
        more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        lines.append(f"    {', '.join(shown[:8])}{more}: {text}")
    return lines
