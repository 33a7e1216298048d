"""Markdown tables, for the scripts that write what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from scripts.bench.report.targets import Target


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def aims(targets: Sequence[Target], text: str) -> str:
    """What was aimed at beside what came out."""
    rows = [target.cells() for target in targets]
    return f"{text}\n\n" + table(("", "aim", "found", ""), rows)
