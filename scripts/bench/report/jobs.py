"""Tables of whole jobs: the main one, what training costs, which architectures work."""

from __future__ import annotations

from statistics import mode
from typing import Any

from maqd_hf.evaluation.model_card import markdown_table


def main_job(result: dict[str, Any]) -> str:
    """The main job, stage by stage."""
    full = result["perplexity"]["float"]
    names = {
        "float": "float model",
        "start": "quantized, before training",
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
            markdown_table(("stage", "perplexity", "to float"), rows),
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
    return f"{text}\n\n" + markdown_table(
        ("", "median step", "to plain", "peak memory", "to plain"), rows
    )


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
        markdown_table(("", "classes", *outcomes, "native decode step"), rows),
    ]
    for outcome in ("refused", "failed"):
        named = [f"`{row['name']}`" for row in result["rows"] if row["result"] == outcome]
        if named:
            parts.append(f"{outcome.capitalize()}: {', '.join(named)}.")
    return "\n\n".join(parts)
