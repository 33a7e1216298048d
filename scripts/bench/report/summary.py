"""The table of README: what a model of so many bits takes, says and does, in six rows.

Every cell is read from a JSON file in results/; what none of them holds is "not measured".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maqd_hf.evaluation.model_card import NOT_MEASURED, markdown_table
from scripts.bench.report.quality import best_rates, perplexities

MODEL = "smollm2-135m-instruct"
SPEEDS = "speed-avx2.json"  # of the slowest machine that was measured


@dataclass(frozen=True)
class Row:
    """``quality``: the row of quality.json; ``speed``: that of ``SPEEDS``."""

    label: str
    quality: str
    speed: str


ROWS = (
    Row("16 bit, float", "float", "transformers bf16"),
    Row("8 bit, 256 levels", "MaQD M=256 g64", "maqd 8 bit g64, 8-bit head"),
    Row("4 bit, 16 levels", "MaQD M=16 g64", "maqd 4 bit g64, 8-bit head"),
    Row("3 bit, 8 levels", "MaQD M=8 g64", "maqd 3 bit g64, 8-bit head"),
    Row("2 bit, 4 levels", "MaQD M=4 g64", "maqd 2 bit g64, 8-bit head"),
    Row("1.6 bit, 3 levels", "MaQD M=3 g64", "maqd ternary g64, 8-bit head"),
)


def six_rows(root: Path) -> str:
    """The table and what its columns are."""
    speeds, threads = _speeds(_load(root, SPEEDS))
    found = _load(root, "quality.json").get("runs", [])
    runs = best_rates(run for run in found if run["table"] == "llm")
    float_bytes = _load(root, "main_job.json").get("float_bytes")
    rows = []
    for row in ROWS:
        speed = speeds.get(row.speed, {})
        size = float_bytes if row.quality == "float" else speed.get("file_bytes")
        rows.append(
            (
                row.label,
                _cell(size and size / 1e6, "{:.0f} MB"),
                _cell(_perplexity(runs, row.quality), "{:.1f}"),
                _cell(speed.get("tokens_per_second"), "{:.0f}"),
            )
        )
    table = markdown_table(("weights", "file", "perplexity", "tokens a second"), rows)
    note = (
        f"`{MODEL}`, 64 weights share a scale, inputs have 8 bits. File and tokens a second "
        f"({threads} threads of a CPU with AVX2 alone, one stream) are those of a model whose "
        "embedding and head have 8 bits (the float model's are bfloat16); perplexity "
        "(WikiText-2 test, the best training tried) is that of one whose embedding and head are "
        "float."
    )
    return "\n\n".join([table, note])


def _load(root: Path, name: str) -> dict[str, Any]:
    path = root / "results" / name
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def _speeds(report: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], int]:
    """The rows of whole models at the most threads, by name, and the threads."""
    rows = [r for r in report.get("models", []) if r["model"] == MODEL and not r["busy"]]
    most = max((row["threads"] for row in rows), default=0)
    return {row["name"]: row for row in rows if row["threads"] == most}, most


def _perplexity(runs: list[dict[str, Any]], name: str) -> float | None:
    mine = [run for run in runs if run["name"] == name]
    if not mine:
        return None
    found: float = min(mine, key=perplexities)["texts"]["wikitext"]["perplexity"]
    return found


def _cell(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else form.format(value)
