"""What a finished run of the main job looks like: a plot and a closing table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


def plot_run(metrics: dict[str, Any], path: Path) -> None:
    """Draw the training loss, and the perplexity from float to the reloaded packed model.

    The bars start below the least of them by as much as they differ, so that this can be seen.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    loss = metrics.get("loss", [])
    left.plot([e["step"] for e in loss], [e["loss"] for e in loss], color="tab:blue")
    left.set(title="distillation loss", xlabel="optimizer step", ylabel="KL to float, nats a token")
    left.grid(alpha=0.3)
    stages = metrics["perplexity"]
    bars = right.bar(list(stages), list(stages.values()), color="tab:blue", width=0.6)
    bars[0].set_color("tab:gray")
    right.bar_label(bars, fmt="%.2f")
    least, most = min(stages.values()), max(stages.values())
    spread = (most - least) or 1.0
    right.set(title="perplexity on held-out text (lower is better)")
    if math.isfinite(spread):
        right.set_ylim(max(0.0, least - spread), most + 0.2 * spread)
    figure.savefig(path, dpi=110)


def summary(metrics: dict[str, Any], folder: Path) -> str:
    """The closing table: what was achieved against float."""
    float_ppl = metrics["perplexity"]["float"]
    rows = [
        (stage, f"{value:.2f}", f"{100 * (value / float_ppl - 1):+.1f} %")
        for stage, value in metrics["perplexity"].items()
    ]
    lines = ["", "stage".ljust(28) + "perplexity".rjust(12) + "to float".rjust(12)]
    lines += [name.ljust(28) + value.rjust(12) + change.rjust(12) for name, value, change in rows]
    static, token = metrics["report"]["static norms"], metrics["report"]["norms per token"]
    packed, full = metrics["packed_bytes"], metrics["float_bytes"]
    lines += [
        "",
        f"{metrics['bits_per_weight']:.2f} bits a weight over the whole model; "
        f"{packed / 2**20:.1f} MiB on disk, {full / 2**20:.1f} MiB in bfloat16 "
        f"({full / packed:.1f}x smaller)",
        f"{len(static)} norms static, {len(token)} per token"
        + (
            f" (KL to per-token norms before training {metrics['norms']['cost']:.3f} nats)"
            if "norms" in metrics
            else ""
        ),
        f"measured: {metrics['protocol']}",
        f"sample: {metrics['sample']!r}",
        f"{metrics['seconds']['total']:.0f} s in all; everything is in {folder}",
        f'load it: import maqd_hf; AutoModelForCausalLM.from_pretrained("{folder / "model"}")',
    ]
    return "\n".join(lines)
