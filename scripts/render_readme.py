"""Write README's tables from the JSON files in results/; no number in them is typed by hand.

    python scripts/render_readme.py            # rewrite the tables
    python scripts/render_readme.py --check    # exit 1 if README.md is not what results/ say

Where each file comes from stands in the table's caption.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- tables -->", "<!-- /tables -->"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    return "\n".join(
        [
            f"`{result['base_model']}`, {result['training']['tokens']:,} training tokens, "
            f"{result['seconds']['total']:.0f} s in all. {result['protocol']}",
            "",
            table(("stage", "perplexity", "to float"), rows),
            "",
            f"{result['bits_per_weight']:.2f} bits a weight over the whole model, embedding and "
            f"scales included; {result['packed_bytes'] / 2**20:.1f} MiB on disk against "
            f"{result['float_bytes'] / 2**20:.1f} MiB in bfloat16. {len(static)} norms are static, "
            f"{len(token)} stayed per token: the budget is too small to move them.",
        ]
    )


def post_training(result: list[dict[str, Any]]) -> str:
    """Start values without training: several metrics.json of scripts/quantize_ptq.py."""
    rows = []
    for run in sorted(result, key=lambda run: -run["arguments"]["weight_levels"]):
        asked, full = run["arguments"], run["float"]["perplexity"]
        group = f"groups of {asked['group_size']}" if asked["group_size"] else "per row"
        found = run["quantized"]["perplexity"]
        rows.append(
            (
                f"{asked['weight_levels']} levels, {group}",
                f"{full:.2f}",
                f"{found:.2f}",
                f"{100 * (found / full - 1):+.1f} %",
                f"{run['quantization_seconds']:.0f} s",
            )
        )
    header = ("weights only, head float", "float", "quantised", "to float", "calibration")
    text = f"WikiText-2 raw test. {result[0]['quantized']['protocol']}"
    return f"{text}\n\n" + table(header, rows)


def norms(result: list[dict[str, Any]]) -> str:
    """What static statistics cost: rows of scripts/lbn_experiments.py."""
    rows = [
        (
            "{table}, {steps} steps of {batch[0]} x {batch[1]}".format(**row),
            row["name"],
            str(row["seed"]),
            f"{row['trained']:.3f}",
            f"{row['static']:.3f}",
        )
        for row in result
    ]
    return table(("model", "norms", "seed", "trained, nats", "static, nats"), rows)


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


SECTIONS: list[tuple[str, str, str, Callable[[Any], str]]] = [
    ("The main job", "main_job.json", "python scripts/qat_llm.py", main_job),
    ("Without training", "ptq-*.json", "python scripts/quantize_ptq.py", post_training),
    ("Static norms", "lbn_experiments.json", "python scripts/lbn_experiments.py", norms),
    ("What training costs", "training.json", "python scripts/benchmark_training.py", training_cost),
]


def render(results: Path) -> str:
    """All sections whose result is there."""
    parts = ["## Measured", "", "Two cores of a shared machine; times are only as good as that."]
    for title, name, command, section in SECTIONS:
        files = [json.loads(path.read_text("utf-8")) for path in sorted(results.glob(name))]
        if not files:
            continue
        content = files if "*" in name else files[0]
        source = f"`results/{name}`, written by `{command}`"
        parts += ["", f"### {title}", "", section(content), "", f"({source})"]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check README.md; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--root", type=Path, default=ROOT)
    args = parser.parse_args(arguments)
    readme = args.root / "README.md"
    text = readme.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = f"{before}{BEGIN}\n{render(args.root / 'results')}\n{END}{after}"
    if args.check:
        if new != text:
            print("README.md differs from results/: run python scripts/render_readme.py")
        return int(new != text)
    readme.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
