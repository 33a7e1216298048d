"""Plots of what lies in results/: quality, losses, static norms over batch sizes, the roofline.

    python -m scripts.bench.report.plots                 # results/*.json -> docs/plots/*.png
    python -m scripts.bench.report.plots --results DIR --output DIR

A plot whose file is not there is skipped with a line that says so. Every line has its name at its
end. Needs matplotlib (``pip install maqd_hf[bench]``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.bench.report.lines import WIDTH, label_lines, style
from scripts.bench.report.targets import at_best_rate, headline

MOST_PERPLEXITY = 2000.0  # beyond it a model says nothing; lines leave the picture there


def family(run: dict[str, Any]) -> str:
    """The line a run belongs to."""
    if run["method"] != "MaQD":
        return str(run["method"])
    if "loss" in run:
        return "MaQD, trained"
    return "MaQD, start values" if run["start"] == "gptq" else "round to nearest"


def quality(content: dict[str, Any], text: str = "wikitext") -> Figure | None:
    """Perplexity on ``text`` against bits a weight; of a family the best run at equal bits.

    MaQD's runs are those with 8-bit inputs that were aimed at.
    """
    runs = [r for r in content["runs"] if r["table"] == "llm" and "4-bit inputs" not in r["name"]]
    runs = [r for r in runs if headline(r) or family(r) == "round to nearest"]
    runs = [r for r in runs if text in r["texts"]]
    base = next((r for r in runs if r["method"] == "float"), None)
    rest = [r for r in runs if r["method"] != "float"]
    if base is None or not rest:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 5))
    floor = base["texts"][text]["perplexity"]
    axes.set(
        yscale="log",
        title=f"{base['model']}, perplexity on {text} (lower is better)",
        xlabel="bits a weight, scales included",
        ylim=(0.9 * floor, MOST_PERPLEXITY),
    )
    families = sorted({family(run) for run in rest}, key=lambda name: (name[:4] != "MaQD", name))
    for index, name in enumerate(families):
        points = _best([r for r in rest if family(r) == name], text)
        ours = name == "MaQD, trained"
        _plot(axes, points, name, index, ours, **({"color": "black"} if ours else {}))
    bits = [run["bits_per_weight"] for run in rest]
    axes.plot([min(bits), max(bits)], [floor, floor], color="black", lw=1, ls=":", label="float")
    axes.set_yticks(ticks := [50, 100, 200, 500, 1000, 2000], map(str, ticks))
    axes.minorticks_off()
    _finish(axes, right=0.76)
    return figure


def _best(runs: list[dict[str, Any]], text: str) -> list[tuple[float, float]]:
    """(bits, perplexity) of the best run at every number of bits."""
    best: dict[float, float] = {}
    for run in runs:
        bits, found = run["bits_per_weight"], run["texts"][text]["perplexity"]
        best[bits] = min(found, best.get(bits, found))
    return sorted(best.items())


def losses(content: dict[str, Any]) -> Figure | None:
    """Distillation loss of trained rows, smoothed; one panel a table, of ``llm`` the headlines."""
    runs = [run for run in content["runs"] if len(run.get("loss", ())) > 1]
    runs = [run for run in runs if run["table"] != "llm" or headline(run)]
    tables = list(dict.fromkeys(run["table"] for run in runs))
    if not tables:
        return None
    figure, panels = plt.subplots(len(tables), 1, figsize=(WIDTH, 4.2 * len(tables)), squeeze=False)
    for panel, table in zip(panels[:, 0], tables, strict=True):
        mine = [r for r in runs if r["table"] == table and r["seed"] == 0]
        best: dict[str, dict[str, Any]] = {}
        for run in mine:  # several learning rates: the one that ended lowest
            other = best.get(run["name"])
            if other is None or mean(run["loss"][-5:]) < mean(other["loss"][-5:]):
                best[run["name"]] = run
        panel.set(
            xscale="log",
            yscale="log",
            title=f"{mine[0]['model']}, distillation loss (KL to float, nats)",
        )
        for index, (name, run) in enumerate(best.items()):
            curve = list(enumerate(_smooth(run["loss"]), start=1))
            _plot(panel, curve, name, index, ours=name.startswith("MaQD"), marker="")
    panels[-1, 0].set_xlabel("step")
    for panel in panels[:, 0]:
        _finish(panel, right=0.72)
    return figure


def _smooth(loss: list[float]) -> list[float]:
    width = max(1, len(loss) // 16)
    return [mean(loss[max(0, i - width) : i + 1]) for i in range(len(loss))]


def batch_size(rows: list[dict[str, Any]]) -> Figure | None:
    """Loss against the mini-batch size at equal samples, one panel a family of models."""
    rows = at_best_rate(rows)
    families = list(dict.fromkeys(row["family"] for row in rows))
    if not families:
        return None
    lines = (len(families) + 1) // 2
    figure, panels = plt.subplots(lines, 2, figsize=(WIDTH, 3.2 * lines), squeeze=False)
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    for panel, name in zip(panels.flat, families, strict=False):
        mine = [row for row in rows if row["family"] == name]
        for index, norm in enumerate(norms):
            found: dict[int, list[float]] = {}
            for row in (row for row in mine if row["norm"] == norm):
                found.setdefault(row["batch_size"], []).append(row["loss"])
            points = [(size, mean(found[size])) for size in sorted(found)]
            if points:
                _plot(panel, points, norm, index, ours=norm.startswith("lbn"))
            for size, losses in found.items():
                panel.scatter([size] * len(losses), losses, s=6, color="gray")
        panel.set(title=f"{name}, held-out loss (nats)", xscale="log")
        sizes = sorted({row["batch_size"] for row in mine})
        panel.set_xticks(sizes, map(str, sizes))
        panel.minorticks_off()
    for panel in list(panels.flat)[len(families) :]:
        panel.remove()
    for panel in panels[-1]:
        panel.set_xlabel("samples in a mini-batch")
    figure.subplots_adjust(wspace=0.62, hspace=0.35)
    for panel in list(panels.flat)[: len(families)]:
        _finish(panel, right=0.87)
    return figure


def roofline(content: dict[str, Any]) -> Figure | None:
    """The largest matrix in every storage, 1 to many tokens: operations per byte of weights against
    operations a second. The ceilings are the highest rates of the run, ours or measured."""
    rows = [row for row in content.get("matrices", []) if "bytes_per_second" in row]
    ceilings = next((row for row in rows if row["name"] == "ceilings"), None)
    products = [r for r in rows if r is not ceilings and "groups" not in r["name"]]
    if ceilings is None or not products:
        return None
    most = max(row["rows"] * row["columns"] for row in products)
    reads = max(row["bytes_per_second"] for row in [*products, ceilings])
    computes = max(row["operations_per_second"] for row in [*products, ceilings])
    figure, axes = plt.subplots(figsize=(WIDTH, 5))
    axes.set(xscale="log", yscale="log", xlabel="operations for every byte of weights")
    large = [row for row in products if row["rows"] * row["columns"] == most]
    for index, name in enumerate(dict.fromkeys(row["name"] for row in large)):
        speeds = [(r["operations_per_second"], r["bytes_per_second"]) for r in large
                  if r["name"] == name]  # fmt: skip
        points = sorted((speed / taken, speed) for speed, taken in speeds)
        _plot(axes, points, name, index, ours=name.startswith("maqd"))
    left, right = axes.get_xlim()
    bend, memory = computes / reads, ceilings["bytes_per_second"]
    axes.plot([left, bend, right], [left * reads, computes, computes], color="black", lw=2)
    axes.plot([left, computes / memory], [left * memory, computes], color="black", lw=1, ls="--")
    note = partial(axes.annotate, textcoords="offset points", fontsize=8, color="black")
    note(f"caches, {reads / 1e9:.0f} GB/s", (bend / 2, computes / 2), (-6, 0), ha="right")
    note(f"memory, {memory / 1e9:.0f} GB/s", (computes / memory, computes), (3, -14))
    note(f"{computes / 1e12:.2f} T operations a second", (bend, computes), (0, 5))
    axes.set(xlim=(left, right), ylim=(None, 2 * computes))
    shape = f"{large[0]['rows']} x {large[0]['columns']}"
    tokens = ", ".join(str(count) for count in dict.fromkeys(row["tokens"] for row in large))
    axes.set_title(f"operations a second, {shape}, {tokens} tokens, {ceilings['threads']} threads")
    _finish(axes, right=0.84, gather=True)
    return figure


def _plot(
    axes: Axes,
    points: list[tuple[Any, float]],
    name: str,
    index: int,
    ours: bool,
    **changes: Any,
) -> None:
    axes.plot(*zip(*points, strict=True), label=name, **style(index, ours) | changes)


def _finish(axes: Axes, right: float, gather: bool = False) -> None:
    """Grid, room for the names at the ``right``, and the names."""
    axes.grid(alpha=0.25, which="both" if axes.get_yscale() == "log" else "major")
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.subplots_adjust(left=0.08, right=right, top=0.94, bottom=0.1)
    named = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    label_lines(axes, named, gather)


PLOTS: dict[str, tuple[str, Callable[[Any], Figure | None]]] = {
    "quality.png": ("quality.json", quality),
    "quality_imdb.png": ("quality.json", partial(quality, text="imdb")),
    "loss.png": ("quality.json", losses),
    "lbn_batch.png": ("lbn_batch.json", batch_size),
    "roofline.png": ("speed.json", roofline),
}


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Draw every plot whose results are there; returns the files written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(__file__).resolve().parents[3]
    parser.add_argument("--results", type=Path, default=root / "results")
    parser.add_argument("--output", type=Path, default=root / "docs" / "plots")
    args = parser.parse_args(arguments)
    matplotlib.rcParams["figure.dpi"] = 110
    written = []
    for name, (source, draw) in PLOTS.items():
        path = args.results / source
        figure = draw(json.loads(path.read_text("utf-8"))) if path.exists() else None
        if figure is None:
            print(f"{name} skipped: nothing to draw in {source}")
            continue
        args.output.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output / name)
        plt.close(figure)
        written.append(args.output / name)
    return written


if __name__ == "__main__":
    for path in main():
        print(path.name)
