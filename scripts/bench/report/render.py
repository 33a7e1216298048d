"""Write the tables of README.md and of results/README.md from the JSON files in results/.

    python -m scripts.bench.report.render            # rewrite the tables
    python -m scripts.bench.report.render --check    # exit 1 if they are not what results/ say

README.md has what a reader looks for first, results/README.md everything. No number in either is
typed by hand; where each file comes from stands below its table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

from scripts.bench.report.norms import batch_sizes, norms, pretrained_norms, static_inference
from scripts.bench.report.quality import (
    ablations,
    block_wise,
    encoders,
    post_training,
    quality,
    quality_in_short,
    zero_shot,
)
from scripts.bench.report.speed import speed, speed_elsewhere, speed_in_short
from scripts.bench.report.tables import table

ROOT = Path(__file__).resolve().parents[3]
BEGIN, END = "<!-- tables -->", "<!-- /tables -->"


def main_job(result: dict[str, Any]) -> str:
    """The main job, stage by stage."""
    full = result["perplexity"]["float"]
    names = {
        "float": "float model",
        "start": "quantised, before training",
        "trained": "after training",
        "reloaded": "packed, saved, loaded with from_pretrained",
    }
    rows = [
        (names[stage], f"{value:.2f}", f"{100 * (value / full - 1):+.1f} %")
        for stage, value in result["perplexity"].items()
    ]
    static, token = result["report"]["static norms"], result["report"]["norms per token"]
    usual = mode(result["report"]["layers"].values())
    return "\n".join(
        [
            f"`{result['base_model']}`, {result['training']['tokens']:,} training tokens, "
            f"{result['seconds']['total']:.0f} s in all. Most layers: {usual}. "
            f"{result['protocol']}",
            "",
            table(("stage", "perplexity", "to float"), rows),
            "",
            f"{result['bits_per_weight']:.2f} bits a weight over the whole model, embedding and "
            f"scales included; {result['packed_bytes'] / 2**20:.1f} MiB on disk against "
            f"{result['float_bytes'] / 2**20:.1f} MiB in bfloat16. {len(static)} norms are static, "
            f"{len(token)} stayed per token: the budget is too small to move them.",
        ]
    )


def training_cost(result: dict[str, Any]) -> str:
    """Step time and memory against a plain fine-tune."""
    rows = [
        (
            row["kind"],
            f"{row['step_seconds']:.2f} s",
            f"{row['time_ratio']:.2f}x",
            f"{row['peak_bytes'] / 2**20:,.0f} MiB",
            f"{row['memory_ratio']:.2f}x",
        )
        for row in result["results"]
    ]
    asked = result["arguments"]
    text = f"{asked['model']}, {asked['batch_size']} x {asked['length']} tokens, float32."
    return f"{text}\n\n" + table(("", "median step", "to plain", "peak memory", "to plain"), rows)


def architectures(result: dict[str, Any]) -> str:
    """How many classes of each task work, and which do not."""
    outcomes = ("works", "refused", "failed", "not tried")
    by_task: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        by_task.setdefault(row["task"], []).append(row)
    rows = []
    for task, classes in by_task.items():
        counts = [sum(row["result"] == outcome for row in classes) for outcome in outcomes]
        native = sum(row["native"] for row in classes)
        rows.append((task, str(len(classes)), *map(str, counts), str(native)))
    parts = [
        f"The classes of transformers {result['versions']['transformers']} in a tiny size with "
        "random weights: converted, trained for a step, packed, saved, loaded, and asked to "
        "generate. Refused are those that `quantize_model` says it does not take, not tried those "
        "whose float model the script could not make small.",
        table(("", "classes", *outcomes, "native decode step"), rows),
    ]
    for outcome in ("refused", "failed"):
        named = [f"`{row['name']}`" for row in result["rows"] if row["result"] == outcome]
        if named:
            parts.append(f"{outcome.capitalize()}: {', '.join(named)}.")
    return "\n\n".join(parts)


@dataclass(frozen=True)
class Section:
    """A part of the results: its files, the command that wrote them and their tables.

    ``short``: its tables in README.md; None: it stands in results/README.md alone.
    """

    title: str
    files: str
    command: str
    whole: Callable[[Any], str]
    short: Callable[[Any], str] | None

    def render(self, results: Path, short: bool) -> list[str]:
        """Lines, none where there is no result or nothing to show of it."""
        show = self.short if short else self.whole
        found = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob(self.files))]
        if not found or show is None:
            return []
        content = show(found if "*" in self.files else found[0])
        source = f"`results/{self.files}`, written by `python scripts/{self.command}`"
        return ["", f"### {self.title}", "", content, "", f"({source})"]


def _same(
    title: str, files: str, command: str, show: Callable[[Any], str], brief: bool = True
) -> Section:
    return Section(title, files, command, show, show if brief else None)


SECTIONS = [
    _same("The main job", "main_job.json", "qat_llm.py", main_job),
    Section(
        "Quality against the peers",
        "quality.json",
        "benchmark_quality.py --data-dir ...",
        quality,
        quality_in_short,
    ),
    _same("Zero-shot", "zero_shot.json", "zero_shot.py --data-dir ...", zero_shot),
    Section("Speed", "speed.json", "benchmark_speed.py", speed, speed_in_short),
    _same(
        "Speed, a CPU without AMX",
        "speed-avx512.json",
        "benchmark_speed.py",
        speed_elsewhere,
    ),
    _same("Without training", "ptq-*.json", "quantize_ptq.py", post_training),
    _same("Static norms", "lbn_experiments.json", "lbn_experiments.py", norms, brief=False),
    _same("Batch sizes", "lbn_batch.json", "lbn_batch_size.py", batch_sizes),
    _same("Static norms, pretrained", "lbn_pretrained.json", "lbn_pretrained.py", pretrained_norms),
    _same(
        "What static norms save", "static_inference.json", "static_inference.py", static_inference
    ),
    _same("Encoders", "encoders.json", "qat_encoder.py --dataset ...", encoders),
    _same("Architectures", "architectures.json", "try_architectures.py", architectures),
    _same("One setting at a time", "ablations.json", "ablations.py", ablations, brief=False),
    _same("Block by block", "blockwise.json", "blockwise_experiments.py", block_wise, brief=False),
    _same("What training costs", "training.json", "benchmark_training.py", training_cost),
]
MORE = "results/README.md"
SHARED = "Two cores of a shared machine; times are only as good as that."


def render(results: Path, short: bool) -> str:
    """All sections whose result is there."""
    lines = [line for section in SECTIONS for line in section.render(results, short)]
    if short:
        more = f"{SHARED} Everything, ablations and single matrices too: [{MORE}]({MORE})."
        return "\n".join(["## Measured", "", more, *lines])
    text = "\n".join(["# Measured", "", SHARED, *lines, ""])
    return text.replace("](results/", "](")


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check both files; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args(arguments)
    results, readme = args.root / "results", args.root / "README.md"
    before, _, rest = readme.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = {
        readme: f"{before}{BEGIN}\n{render(results, short=True)}\n{END}{after}",
        results / "README.md": render(results, short=False),
    }
    stale = [p for p, text in wanted.items() if not p.exists() or p.read_text("utf-8") != text]
    for path in stale:
        if args.check:
            print(f"{path} differs from results/: run python -m scripts.bench.report.render")
        else:
            path.write_text(wanted[path], "utf-8")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
