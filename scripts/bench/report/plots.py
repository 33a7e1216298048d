"""Plots of what lies in results/: quality against bits, loss curves, LBN against the batch size.

    python -m scripts.bench.report.plots                 # results/*.json -> results/plots/*.png
    python -m scripts.bench.report.plots --results DIR --output DIR

A plot whose file is not there is skipped with a line that says so. Needs matplotlib
(``pip install maqd_hf[bench]``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from scripts.bench.report.targets import at_best_rate, headline

MOST_PERPLEXITY = 3000.0  # beyond it a model says nothing; drawn at the edge


def family(run: dict[str, Any]) -> str:
    """The line a run belongs to."""
    if run["method"] != "MaQD":
        return str(run["method"])
    if "loss" in run:
        return "MaQD, trained"
    return "MaQD start (GPTQ)" if run["start"] == "gptq" else "round to nearest"


def quality(content: dict[str, Any]) -> Figure | None:
    """Perplexity against bits a weight, one panel a text; of a family the best at equal bits.

    Of MaQD only what has 8-bit inputs and was aimed at.
    """
    runs = [r for r in content["runs"] if r["table"] == "llm" and "4-bit inputs" not in r["name"]]
    runs = [r for r in runs if headline(r) or family(r) == "round to nearest"]
    base = next((r for r in runs if r["method"] == "float"), None)
    rest = [r for r in runs if r["method"] != "float"]
    if base is None or not rest:
        return None
    texts = list(base["texts"])
    figure, panels = plt.subplots(
        1, len(texts), figsize=(6 * len(texts), 4.6), squeeze=False, layout="constrained"
    )
    families = list(dict.fromkeys(family(run) for run in rest))
    families.sort(key=lambda name: not name.startswith("MaQD"))
    for panel, text in zip(panels[0], texts, strict=True):
        panel.axhline(
            base["texts"][text]["perplexity"], color="black", lw=1, ls="--", label="float"
        )
        markers = cycle("sD^vPX*<>hp")
        for name in families:
            best: dict[float, float] = {}
            for run in (r for r in rest if family(r) == name):
                bits, found = run["bits_per_weight"], run["texts"][text]["perplexity"]
                best[bits] = min(found, best.get(bits, MOST_PERPLEXITY))
            points = sorted(best.items())
            ours = name == "MaQD, trained"
            panel.plot(
                *zip(*points, strict=True),
                marker="o" if ours else next(markers),
                lw=2 if ours else 1,
                color="black" if ours else None,
                alpha=1 if ours else 0.8,
                label=name,
            )
        panel.set(
            yscale="log",
            title=text,
            xlabel="bits a weight, scales included",
            ylabel=f"perplexity ({MOST_PERPLEXITY:.0f}: or more)",
        )
        panel.grid(alpha=0.3, which="both")
    panels[0][-1].legend(fontsize=8)
    return figure


def losses(content: dict[str, Any]) -> Figure | None:
    """Distillation loss of trained rows, smoothed; one panel a table, of ``llm`` the headlines."""
    runs = [run for run in content["runs"] if len(run.get("loss", ())) > 1]
    runs = [run for run in runs if run["table"] != "llm" or headline(run)]
    tables = list(dict.fromkeys(run["table"] for run in runs))
    if not tables:
        return None
    figure, panels = plt.subplots(
        1, len(tables), figsize=(8 * len(tables), 4.6), squeeze=False, layout="constrained"
    )
    for panel, table in zip(panels[0], tables, strict=True):
        panel.set_prop_cycle(color=[plt.colormaps["tab20"](i) for i in range(20)])
        mine = [r for r in runs if r["table"] == table and r["seed"] == 0]
        best: dict[str, dict[str, Any]] = {}
        for run in mine:  # several learning rates: the one that ended lowest
            other = best.get(run["name"])
            if other is None or mean(run["loss"][-5:]) < mean(other["loss"][-5:]):
                best[run["name"]] = run
        for name, run in best.items():
            width = max(1, len(run["loss"]) // 16)
            smooth = [mean(run["loss"][max(0, i - width) : i + 1]) for i in range(len(run["loss"]))]
            ours = name.startswith("MaQD")
            panel.plot(smooth, label=name, lw=1.8 if ours else 1, ls="-" if ours else "--")
        panel.set(
            yscale="log", title=f"{mine[0]['model']}", xlabel="step", ylabel="KL to float, nats"
        )
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def batch_size(rows: list[dict[str, Any]]) -> Figure | None:
    """Loss against the mini-batch size at equal samples, one panel a family of models."""
    rows = at_best_rate(rows)
    families = list(dict.fromkeys(row["family"] for row in rows))
    if not families:
        return None
    figure, panels = plt.subplots(
        1, len(families), figsize=(4 * len(families), 3.6), squeeze=False, layout="constrained"
    )
    for panel, name in zip(panels[0], families, strict=True):
        mine = [row for row in rows if row["family"] == name]
        for norm in dict.fromkeys(row["norm"] for row in mine):
            found: dict[int, list[float]] = {}
            for row in mine:
                if row["norm"] == norm:
                    found.setdefault(row["batch_size"], []).append(row["loss"])
            sizes = sorted(found)
            values = [mean(found[size]) for size in sizes]
            panel.plot(sizes, values, marker="o", label=norm)
            for size in sizes:
                panel.scatter([size] * len(found[size]), found[size], s=8, color="gray")
        panel.set(title=name, xlabel="mini-batch", ylabel="loss, nats")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    return figure


PLOTS: dict[str, tuple[str, Callable[[Any], Figure | None]]] = {
    "quality.png": ("quality.json", quality),
    "loss.png": ("quality.json", losses),
    "lbn_batch.png": ("lbn_batch.json", batch_size),
}


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Draw every plot whose results are there; returns the files written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(__file__).resolve().parents[3] / "results"
    parser.add_argument("--results", type=Path, default=root)
    parser.add_argument("--output", type=Path, help="default: plots/ in --results")
    args = parser.parse_args(arguments)
    output = args.output or args.results / "plots"
    written = []
    for name, (source, draw) in PLOTS.items():
        path = args.results / source
        figure = draw(json.loads(path.read_text("utf-8"))) if path.exists() else None
        if figure is None:
            print(f"{name} skipped: nothing to draw in {source}")
            continue
        output.mkdir(parents=True, exist_ok=True)
        figure.savefig(output / name, dpi=110)
        plt.close(figure)
        written.append(output / name)
    return written


if __name__ == "__main__":
    for path in main():
        print(path.name)
