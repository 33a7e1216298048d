"""Evidence in the code leads somewhere: titles it names are entries of docs/notebook.md."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENTRY = re.compile(r"^## (\d{4}-\d{2}-\d{2}) (.+?)(?: \(negative\))?$", re.MULTILINE)
SOURCES = [
    path
    for folder in ("maqd_hf", "scripts")
    for suffix in ("*.py", "*.c", "*.h", "*.inc")
    for path in sorted((ROOT / folder).rglob(suffix))
]


def entries(text: str) -> list[tuple[str, str]]:
    """The days and titles of a notebook."""
    return ENTRY.findall(text)


def named_titles(source: str) -> list[str]:
    """The titles that a file names as ``(notebook: "one title", "another")``."""
    text = re.sub(r"\s*\n\s*(?:#|//|\*)?\s*", " ", source)
    named = re.findall(r"\(notebook: ([^()]*)\)", text)
    return [title for part in named for title in re.findall(r'"([^"]+)"', part)]


def test_titles_are_found_across_lines_and_comments() -> None:
    source = 'x = 1  # faster (notebook: "One\n# two", "Three")\n"""(notebook: "Four\n  five")."""'
    assert named_titles(source) == ["One two", "Three", "Four five"]
    assert entries("## 2026-01-02 One two (negative)\n") == [("2026-01-02", "One two")]


def test_every_title_that_the_code_names_is_an_entry() -> None:
    titles = {title for _, title in entries((ROOT / "docs" / "notebook.md").read_text("utf-8"))}
    named = {title: path for path in SOURCES for title in named_titles(path.read_text("utf-8"))}
    assert len(named) > 20
    assert not {title: path.name for title, path in named.items() if title not in titles}


def test_entries_are_dated_newest_first_and_their_titles_differ() -> None:
    found = entries((ROOT / "docs" / "notebook.md").read_text("utf-8"))
    days, titles = zip(*found, strict=True)
    assert list(days) == sorted(days, reverse=True)
    assert len(set(titles)) == len(titles)
