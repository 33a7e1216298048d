"""Tables about Layer-Batch Normalization and static norms."""

from __future__ import annotations

from statistics import mean
from typing import Any

from maqd_hf.evaluation.model_card import markdown_table
from scripts.bench.report.targets import aims, at_best_rate, batch_size_targets, static_norm_targets


def norms(result: list[dict[str, Any]]) -> str:
    """What static statistics cost: rows of scripts/experiments/lbn_from_scratch.py."""
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
    return markdown_table(("model", "norms", "seed", "trained, nats", "static, nats"), rows)


def _over_seeds(rows: list[dict[str, Any]]) -> str:
    """Mean loss and its range, and the same of the accuracy where there is one."""

    def cell(values: list[float], digits: int, unit: str = "") -> str:
        middle = f"{mean(values):.{digits}f}{unit}"
        if len(values) == 1:
            return middle
        return f"{middle}, {min(values):.{digits}f} to {max(values):.{digits}f}"

    if not rows:
        return ""
    text = cell([row["loss"] for row in rows], 3)
    if "accuracy" in rows[0]:
        text += f" ({cell([100 * row['accuracy'] for row in rows], 1, ' %')})"
    return text


def batch_sizes(result: list[dict[str, Any]]) -> str:
    """Static norms at several batch sizes: rows of scripts/experiments/lbn_batch_size.py."""
    names = {
        "float": "float",
        "lbn": "LBN, every norm static",
        "lbn, final float": "LBN, final norm per token",
        "lbn, fixed end": "LBN, constants for the last 40 % of the steps",
        "lbn, eased in": "the same, statistics of each token at first",
        "batch": "Batch Normalization",
    }
    result = at_best_rate(result)
    sizes = sorted({row["batch_size"] for row in result})
    rows = []
    families = list(dict.fromkeys(row["family"] for row in result))
    kinds = {(row["family"], row["norm"]) for row in result}
    order = [(f, n) for f in families for n in names if (f, n) in kinds]
    for family, norm in order:
        cells = []
        for size in sizes:
            key = {"family": family, "norm": norm, "batch_size": size}
            found = [row for row in result if key.items() <= row.items()]
            cells.append(_over_seeds(found))
        rows.append((family, names[norm], *cells))
    samples = {row["family"]: f"{row['family']} {row['samples']:,}" for row in result}
    text = (
        f"Small models from scratch, held-out loss in nats, {', '.join(samples.values())} samples; "
        "each batch size sees the same samples in the same order. LBN is evaluated with constants. "
        "Where several learning rates were tried, each kind of norm has its best one. "
        "Mean, least and most of several seeds."
    )
    numbers = markdown_table(("model", "norms", *(f"{size} a step" for size in sizes)), rows)
    aimed = aims(batch_size_targets(result), "What was aimed at:")
    return "\n\n".join((text, numbers, aimed))


def pretrained_norms(result: list[dict[str, Any]]) -> str:
    """Static norms in pretrained models: rows of scripts/experiments/lbn_pretrained.py."""
    rows = [
        (
            f"`{row['model']}`, {row['steps']} steps",
            row["norms"] + (f", {row['tolerance']:g} nats" if "tolerance" in row else ""),
            str(row["seed"]),
            f"{len(row['static'])} of {row['gated']}",
            *(f"{row[stage]:.3f}" for stage in ("float", "start", "loss")),
        )
        for row in result
    ]
    header = ("model", "norms", "seed", "static norms", "float", "start", "packed")
    text = "16 weight levels, 8-bit static activations, held-out loss in nats."
    parts = [
        text,
        markdown_table(header, rows),
        aims(static_norm_targets(result), "What was aimed at:"),
    ]
    for row in result:
        costs = {choice["name"]: choice["alone"] for choice in row.get("choices", [])}
        if costs:
            known = {name: cost for name, cost in costs.items() if cost is not None}
            worst = sorted(known, key=lambda name: -known[name])[:6]
            listed = ", ".join(f"`{name}` {known[name]:.3f}" for name in worst)
            cheap = sum(cost <= 0.02 for cost in known.values())
            parts.append(
                f"`{row['model']}`, each norm static alone, before training: {cheap} of "
                f"{len(costs)} cost at most 0.02 nats; the most expensive are {listed}."
            )
    return "\n\n".join(parts)


def static_inference(result: list[dict[str, Any]]) -> str:
    """What is left per token, and blocks in integers: scripts/experiments/static_inference.py."""
    rows: list[tuple[str, ...]] = []
    lines: list[tuple[str, ...]] = []
    for model in result:
        for form, cost in model["costs"].items():
            left = (f"{cost['left'][name]:,}" for name in model["operations"])
            rows.append((f"`{model['model']}`", form, *left))
        blocks = model.get("blocks", [])
        for stage in [key for key in (blocks or [{}])[0] if isinstance(blocks[0][key], dict)]:
            codes, differ = (sum(b[stage][key] for b in blocks) for key in ("codes", "differ"))
            most = max(block[stage]["most"] for block in blocks)
            lines.append(
                (
                    f"`{model['model']}`, {len(blocks)} blocks",
                    stage,
                    f"{codes:,}",
                    f"{100 * differ / codes:.4f} %",
                    str(most),
                )
            )
    header = (
        "model",
        "norms and steps",
        *(name.replace("_", " ") for name in result[0]["operations"]),
    )
    parts = ["Per token, around the matrix products (`maqd_hf.inference_cost`):"]
    parts.append(markdown_table(header, rows))
    if lines:
        parts.append(
            "The feed-forward half of a block in integers alone "
            "(`maqd_hf.evaluation.integer_block`), its int8 codes beside the packed model's:"
        )
        parts.append(markdown_table(("", "codes", "number", "differ", "by at most"), lines))
    return "\n\n".join(parts)
