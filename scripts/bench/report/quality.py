"""Tables of what quantization costs in quality."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from statistics import mean
from typing import Any

from maqd_hf.evaluation.model_card import markdown_table
from scripts.bench.quality_peers import CALIBRATED
from scripts.bench.report.targets import aims, encoder_targets, quality_targets


def quality(result: dict[str, Any]) -> str:
    """Perplexity at equal bits, peers and other rules: runs of scripts/bench/quality.py."""
    runs = best_rates(run for run in result["runs"] if run["table"] == "llm")
    base = next(run for run in runs if run["method"] == "float")
    texts = list(base["texts"])
    rows = []
    for run in sorted(runs, key=lambda run: (-run["bits_per_weight"], perplexities(run))):
        inputs = run["activations"]
        cells = [run["name"], f"{run['bits_per_weight']:.2f}"]
        cells.append(f"{math.log2(inputs + 1):.0f} bit" if inputs else "float")
        cells.append(f"{run['samples'] * run['block_size']:,}" if _calibrated(run) else "")
        cells.append(f"{run['tokens']:,}" if "loss" in run else "")
        for text in texts:
            full, found = (r["texts"][text]["perplexity"] for r in (base, run))
            cells += [f"{found:,.1f}", "" if run is base else f"{100 * (found / full - 1):+,.1f} %"]
        rows.append(cells)
    header = ["", "bits a weight", "inputs", "calibrated on, tokens", "trained on, tokens"]
    for text in texts:
        header += [text, "to float"]
    trained = [run for run in runs if "loss" in run]
    parts = [
        f"`{base['model']}`, embedding and head in float everywhere, the first "
        f"{base['windows']} windows of {base['window']} tokens of each text. Bits count the scales "
        "a package stores. Most peers leave the inputs in float, which is easier for them; rows "
        "with tokens are trained (distillation), the others are not, so compare a trained row with "
        "its own start values too. M is the number of levels: 16 is 4 bit, 4 is 2 bit, 3 ternary. "
        "g64: 64 inputs share a weight scale; inputs have a step a token, or with `inputs g64` one "
        "for every 64 of a token. SEQ, LSQ and BitNet are the rules of other papers "
        "(`scripts/bench/quality_rules.py`); they and torchao's QAT are trained by the same loop "
        "as MaQD, and shown at the best rate tried. auto-round is given fewer steps than its own "
        "default, which takes hours here (`scripts/bench/quality_peers.py`)."
        f"{_seen(runs)}",
        markdown_table(header, rows),
    ]
    if trained:
        parts.append(aims(quality_targets(runs), "What was aimed at, on the worse text:"))
    if result["missing"]:
        named = "; ".join(f"{name}: {reason}" for name, reason in result["missing"].items())
        parts.append(f"Did not run: {named}.")
    small = [run for run in result["runs"] if run["table"] == "rules"]
    return "\n\n".join([*parts, *([_rules(small)] if small else [])])


def best_rates(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best of each set of runs that differ in the learning rate alone."""
    best: dict[Any, dict[str, Any]] = {}
    for run in runs:
        samples = run["samples"] if _calibrated(run) else None
        key = run["name"], run.get("tokens"), run.get("train"), run.get("seed"), samples
        best[key] = min(best.get(key, run), run, key=perplexities)
    return list(best.values())


def _calibrated(run: dict[str, Any]) -> bool:
    """Whether its start values come from the calibration samples."""
    if run["method"] == "MaQD":
        return run["start"] == "gptq" or run["scaling"] == "static"
    return run["method"] in CALIBRATED


def _seen(runs: list[dict[str, Any]]) -> str:
    """What was calibrated and trained on."""
    texts = list(dict.fromkeys(run["train"] for run in runs if "train" in run))
    return f" Calibrated and trained on equal parts of: {', or '.join(texts)}." if texts else ""


def perplexities(run: dict[str, Any]) -> float:
    """The product of a run's perplexities on all texts: what runs are compared by."""
    return math.prod(text["perplexity"] for text in run["texts"].values())


def _rules(runs: list[dict[str, Any]]) -> str:
    """Each rule with the best of its learning rates: mean and range over the seeds."""
    (text,) = runs[0]["texts"]
    rows = []
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == name]
        rate = min(mine, key=perplexities).get("learning_rate")
        chosen = [run for run in mine if run.get("learning_rate") == rate]
        found = [run["texts"][text]["nats"] for run in chosen]
        spread = f"{min(found):.3f} to {max(found):.3f}" if len(found) > 1 else ""
        rows.append((name, f"{rate:g}" if rate else "", f"{mean(found):.3f}", spread))
    trained = next(run for run in runs if "tokens" in run)
    head = (
        f"`{runs[0]['model']}`, one scale a row (BitNet: a tensor), 8-bit inputs, "
        f"{trained['tokens']:,} tokens of distillation by the same loop, nats on {text}; each rule "
        "at the best of the learning rates tried, mean and range over the seeds. `search` and "
        "`gptq` say how MaQD's grid starts; the other rules start as their papers do, which is "
        "part of the difference at so few steps."
    )
    return f"{head}\n\n{markdown_table(('', 'learning rate', 'nats', 'seeds'), rows)}"


def zero_shot(result: dict[str, Any]) -> str:
    """Accuracy without examples: rows of scripts/bench/zero_shot.py."""
    runs = result["runs"]
    columns = [
        (run["task"], measure)
        for run in {run["task"]: run for run in runs}.values()
        for measure in ("acc", "acc_norm")
        if measure in run
    ]
    rows = []
    for model in dict.fromkeys(run["model"] for run in runs):
        found = {run["task"]: run for run in runs if run["model"] == model}
        cells = [
            f"{100 * run[measure]:.1f} (± {100 * run[f'{measure}_stderr']:.1f})" if run else ""
            for task, measure in columns
            for run in [found.get(task)]
        ]
        rows.append((model, *cells))
    counts = ", ".join(f"{n} of {t}" for t, n in {r["task"]: r["questions"] for r in runs}.items())
    text = f"Accuracy in per cent and its standard error; questions asked: {counts}."
    return f"{text}\n\n" + markdown_table(
        ("", *(f"{task}, {what}" for task, what in columns)), rows
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
                f"{run['quantization_cpu_seconds']:.0f} s",
            )
        )
    header = ("weights only, head float", "float", "quantized", "to float", "processor time")
    text = f"WikiText-2 raw test. {result[0]['quantized']['protocol']}"
    return f"{text}\n\n" + markdown_table(header, rows)


def encoders(result: list[dict[str, Any]]) -> str:
    """Classifiers on their held-out texts: rows of scripts/qat_encoder.py."""

    def bits(levels: int) -> str:
        return f"{levels} ({math.log2(levels):.2g} bit)"

    rows = []
    for row in result:
        share = row["accuracy"]
        static, token = (len(row["norms"][kind]) for kind in ("static", "per_token"))
        rows.append(
            (
                row["dataset"],
                f"{bits(row['weight_levels'])} / {bits(row['activation_levels'])}",
                *(f"{100 * share[stage]:.2f}" for stage in ("float", "start", "packed")),
                f"{100 * (share['packed'] - share['float']):+.2f}",
                f"{row['epochs']:.3g} in {row['seconds']['training']:.0f} s",
                f"{static} of {static + token}",
                f"{row['bits_per_weight']:.2f}",
                f"{row['file_bytes'] / 2**20:.1f} MiB",
            )
        )
    header = [
        "texts", "levels, weights / activations", "float", "start", "packed", "to float",
        "epochs", "static norms", "bits a weight", "file",
    ]  # fmt: skip
    models = ", ".join(sorted({f"`{row['model']}`" for row in result}))
    texts = [
        "{dataset}, {eval_rows:,} texts (standard error {error:.1f}), {train_rows:,} seen".format(
            error=100 * math.sqrt(share * (1 - share) / row["eval_rows"]), **row
        )
        for row in {row["dataset"]: row for row in result}.values()
        for share in [row["accuracy"]["float"]]
    ]
    text = (
        f"{models} with a classification head, accuracy in per cent on held-out texts: "
        f"{'; '.join(texts)}. Float: {result[0]['float_bytes'] / 2**20:.1f} MiB."
    )
    aimed = aims(encoder_targets(result), "What was aimed at:")
    return f"{text}\n\n{markdown_table(header, rows)}\n\n{aimed}"


def block_wise(result: list[dict[str, Any]]) -> str:
    """Ways to spend the same training tokens: rows of scripts/experiments/blockwise.py."""
    tables = []
    keyed = [(json.dumps(row["arguments"], sort_keys=True), row) for row in result]
    for key in dict.fromkeys(key for key, _ in keyed):
        asked = json.loads(key)
        rows = []
        for row in (row for other, row in keyed if other == key):
            stages = ("float", "start", "block-wise", "end to end")
            numbers = [f"{math.exp(row[stage]):.2f}" if stage in row else "" for stage in stages]
            rows.append((row["name"], str(row["levels"]), *numbers))
        group = f"groups of {asked['group_size']}" if asked["group_size"] else "one scale a row"
        text = (
            f"`{asked['model']}`, {asked['tokens']:,} training tokens a row, {group}, activations "
            f"{asked['activation_levels']} levels per token. Perplexity after each stage."
        )
        header = ("tokens go to", "levels", "float", "start (GPTQ)", "block-wise", "end to end")
        tables.append(f"{text}\n\n{markdown_table(header, rows)}")
    return "\n\n".join(tables)


def ablations(result: list[dict[str, Any]]) -> str:
    """One setting changed at a time: rows of the ablations, mean and range of the seeds."""
    first = result[0]
    rows = []
    for name in dict.fromkeys(run["name"] for run in result):
        runs = [run for run in result if run["name"] == name]
        seeds = {run["seed"] for run in runs}
        same = [r for r in result if r["name"] == first["name"] and r["seed"] in seeds]
        found = [run["trained"] for run in runs]
        gap = mean(found) - mean(run["trained"] for run in same)
        cells = [f"{mean(run['start'] for run in runs):.3f}", f"{mean(found):.3f}"]
        cells.append(f"{min(found):.3f} to {max(found):.3f}")
        rows.append((name, *cells, "" if name == first["name"] else f"{gap:+.3f}"))
    text = (
        f"`stories260K` (float {first['float']:.3f}), {first['weight_levels']} levels of weights, "
        f"one scale a row, {first['activation_levels']} of inputs, one learned step a layer; "
        f"{first['steps']} steps of 8 x 256 tokens, nats on held-out stories, mean and range of "
        f"{len({run['seed'] for run in result})} seeds."
    )
    header = ("changed", "start", "trained", "seeds", "to the first")
    return f"{text}\n\n{markdown_table(header, rows)}"
