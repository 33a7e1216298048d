"""Write README's tables from the JSON files in results/; no number in them is typed by hand.

    python scripts/render_readme.py            # rewrite the tables
    python scripts/render_readme.py --check    # exit 1 if README.md is not what results/ say

Where each file comes from stands in the table's caption.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, mode
from typing import Any

from quality_peers import CALIBRATED
from targets import (
    Target,
    batch_size_targets,
    encoder_targets,
    load_ratio,
    quality_targets,
    speed_targets,
    static_norm_targets,
)

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- tables -->", "<!-- /tables -->"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def aims(targets: Sequence[Target], text: str) -> str:
    """What was aimed at beside what came out."""
    rows = [target.cells() for target in targets]
    return f"{text}\n\n" + table(("", "aim", "found", ""), rows)


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
    header = ("weights only, head float", "float", "quantised", "to float", "processor time")
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


def batch_sizes(result: list[dict[str, Any]]) -> str:
    """Static norms at several batch sizes: rows of scripts/lbn_batch_size.py."""
    names = {
        "float": "float",
        "lbn": "LBN, every norm static",
        "lbn, final float": "LBN, final norm per token",
        "lbn, fixed end": "LBN, constants for the last 40 % of the steps",
        "batch": "Batch Normalization",
    }
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
            losses = [f"{row['loss']:.3f}" for row in found]
            shares = [f" ({100 * row['accuracy']:.1f} %)" for row in found if "accuracy" in row]
            pairs = (a + b for a, b in zip(losses, shares or [""] * len(losses), strict=True))
            cells.append(", ".join(pairs))
        rows.append((family, names[norm], *cells))
    samples = {row["family"]: f"{row['family']} {row['samples']:,}" for row in result}
    text = (
        f"Small models from scratch, held-out loss in nats, {', '.join(samples.values())} samples; "
        "each batch size sees the same samples in the same order. LBN is evaluated with constants."
    )
    numbers = table(("model", "norms", *(f"{size} a step" for size in sizes)), rows)
    aimed = aims(batch_size_targets(result), "What was aimed at:")
    plot = "![loss against batch size](results/plots/lbn_batch.png)"
    return "\n\n".join((text, numbers, plot, aimed))


def pretrained_norms(result: list[dict[str, Any]]) -> str:
    """Static norms in pretrained models: rows of scripts/lbn_pretrained.py."""
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
    parts = [text, table(header, rows), aims(static_norm_targets(result), "What was aimed at:")]
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
    """What is left per token, and blocks in integers: scripts/static_inference.py."""
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
    parts.append(table(header, rows))
    if lines:
        parts.append(
            "The feed-forward half of a block in integers alone (`maqd_hf.integer`), its int8 "
            "codes beside the packed model's:"
        )
        parts.append(table(("", "codes", "number", "differ", "by at most"), lines))
    return "\n\n".join(parts)


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
    return f"{text}\n\n{table(header, rows)}\n\n{aimed}"


def block_wise(result: list[dict[str, Any]]) -> str:
    """Ways to spend the same training tokens: rows of scripts/blockwise_experiments.py."""
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
        tables.append(f"{text}\n\n{table(header, rows)}")
    return "\n\n".join(tables)


def compiled_decoding(result: dict[str, Any]) -> list[str]:
    """Decoding under torch.compile."""
    rows = [
        (row["name"], f"{1e3 * row['token_seconds']:.1f}", f"{row['to_bf16']:.2f}x")
        for row in result.get("compiled", [])
    ]
    if not rows:
        return []
    threads = result["compiled"][0]["threads"]
    text = f"`torch.compile(fullgraph=True)`, static cache, {threads} threads."
    return [f"{text}\n\n{table(['', 'ms a token', 'to bf16'], rows)}"]


def loading(result: dict[str, Any]) -> list[str]:
    """What loading costs beside reading the same bytes and importing the framework."""
    if "import_seconds" not in result:
        return []
    row = next(row for row in result["models"] if row["name"] == "maqd 2 bit, 8-bit head")
    return [
        f"Importing torch and transformers takes {result['import_seconds']:.1f} s, reading the "
        f"{row['file_bytes'] / 2**20:.0f} MiB of the 2-bit model {row['read_seconds']:.2f} s, "
        f"loading it {row['load_seconds']:.2f} s: "
        f"{load_ratio(row, result['import_seconds']):.2f} times both."
    ]


def ceilings(result: dict[str, Any]) -> list[str]:
    """The machine's bandwidth and arithmetic, and how near one token and many come to them."""
    rows = result.get("matrices", [])
    found = next((row for row in rows if row["name"] == "ceilings"), None)
    if not found:
        return []
    large = [row for row in rows if row.get("rows") == 11008 and row["tokens"] == 1]
    shares = []
    for row in large:
        if row["name"].startswith("maqd") and "groups" not in row["name"]:
            share = row["bytes_per_second"] / found["bytes_per_second"]
            shares.append(f"{row['name'].removeprefix('maqd ')} {share:.0%}")
    absent = "; ".join(f"{name} ({why})" for name, why in found.get("missing", {}).items())
    plot = "results/plots/roofline.png"
    picture = f"\n\n![Roofline]({plot})" if (ROOT / plot).exists() else ""
    return [
        f"In the same run {found['threads']} threads read memory at "
        f"{found['bytes_per_second'] / 1e9:.0f} GB/s and multiply 8-bit numbers at "
        f"{found['operations_per_second'] / 2e9:.0f} billion a second. One token at 11008 x 4096 "
        f"uses of that bandwidth (above 100 %: weights stay in the cache): {', '.join(shares)}."
        f"{' Not timed: ' * bool(absent)}{absent}{picture}"
    ]


def speed(result: dict[str, Any]) -> str:
    """Packed models and matrices beside what else could run them."""
    tables = []
    if result["missing_rivals"]:
        tables.append(f"Rivals not installed in this run: {', '.join(result['missing_rivals'])}.")
    running = [row for key in ("models", "busy", "large") for row in result.get(key, [])]
    for label, threads, busy in dict.fromkeys(
        (row["model"], row["threads"], row["busy"]) for row in running
    ):
        key = {"model": label, "threads": threads, "busy": busy}
        rows = [
            (
                row["name"],
                f"{row['tokens_per_second']:.0f}",
                f"{row['to_bf16']:.2f}x" if "to_bf16" in row else "",
                f"{row['batch_tokens_per_second']:.0f}" if "batch_tokens_per_second" in row else "",
                f"{row['prefill_tokens_per_second']:.0f}",
                f"{1000 * row['first_token_seconds']:.0f} ms",
                f"{row['load_seconds']:.1f} s",
                f"{row['peak_bytes'] / 2**20:.0f} MiB",
            )
            for row in running
            if key.items() <= row.items()
        ]
        header = (
            "", "tokens a second", "to bf16", "eight streams", "prefill, tokens a second",
            "first token after 16", "load", "memory above the framework's",
        )  # fmt: skip
        beside = f", beside {busy} processes that compute" if busy else ""
        text = f"`{label}`, one stream, {threads} thread(s){beside}."
        tables.append(f"{text}\n\n{table(header, rows)}")
    tables += [*compiled_decoding(result), *loading(result)]
    for row in result.get("agreement", []):
        levels = row["activation_levels"]
        kind = f"{levels} activation levels" if levels else "float activations"
        gaps = sorted(row["gaps"])
        middle = gaps[len(gaps) // 2] if gaps else 0
        parted = f"; median gap of the two best logits where others part: {middle:.2g}"
        tables.append(
            f"Greedy text of the native decode step and of the model's own forward, "
            f"{kind}: {row['equal']} of {row['prompts']} prompts give the same "
            f"{row['new_tokens']} tokens"
            f"{parted if gaps else ''}."
        )
    tables += ceilings(result)
    matrices = [row for row in result.get("matrices", []) if "seconds" in row]
    for tokens in dict.fromkeys(row["tokens"] for row in matrices):
        chosen = [row for row in matrices if row["tokens"] == tokens]
        shapes = list(dict.fromkeys((row["rows"], row["columns"]) for row in chosen))
        cells = {(row["name"], (row["rows"], row["columns"])): row["seconds"] for row in chosen}
        rows = [
            (name, *(f"{1e6 * cells[name, s]:,.0f}" if (name, s) in cells else "" for s in shapes))
            for name in dict.fromkeys(row["name"] for row in chosen)
        ]
        text = f"One matrix, {tokens} token(s), {chosen[0]['threads']} threads, microseconds."
        tables.append(f"{text}\n\n{table(['', *(f'{a} x {b}' for a, b in shapes)], rows)}")
    tables.append(aims(speed_targets(result), "Ratios that were aimed at (`scripts/targets.py`):"))
    return "\n\n".join(tables)


def quality(result: dict[str, Any]) -> str:
    """Perplexity at equal bits, peers and other rules: runs of scripts/benchmark_quality.py."""
    runs = _best_rates(run for run in result["runs"] if run["table"] == "llm")
    base = next(run for run in runs if run["method"] == "float")
    texts = list(base["texts"])
    rows = []
    for run in sorted(runs, key=lambda run: (-run["bits_per_weight"], _perplexities(run))):
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
        "(`scripts/quality_rules.py`); they and torchao's QAT are trained by the same loop as "
        "MaQD, and shown at the best rate tried. auto-round is given fewer steps than its own "
        "default, which takes hours here (`scripts/quality_peers.py`)."
        f"{_seen(runs)}",
        table(header, rows),
    ]
    if trained:
        parts.append("![perplexity against bits a weight](results/plots/quality.png)")
        parts.append(aims(quality_targets(runs), "What was aimed at, on the worse text:"))
    if result["missing"]:
        named = "; ".join(f"{name}: {reason}" for name, reason in result["missing"].items())
        parts.append(f"Did not run: {named}.")
    small = [run for run in result["runs"] if run["table"] == "rules"]
    return "\n\n".join([*parts, *([_rules(small)] if small else [])])


def _best_rates(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of runs that differ in the learning rate alone, the best."""
    best: dict[Any, dict[str, Any]] = {}
    for run in runs:
        samples = run["samples"] if _calibrated(run) else None
        key = run["name"], run.get("tokens"), run.get("train"), run.get("seed"), samples
        best[key] = min(best.get(key, run), run, key=_perplexities)
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


def _perplexities(run: dict[str, Any]) -> float:
    return math.prod(text["perplexity"] for text in run["texts"].values())


def _rules(runs: list[dict[str, Any]]) -> str:
    """Each rule with the best of its learning rates: mean and range over the seeds."""
    (text,) = runs[0]["texts"]
    rows = []
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == name]
        rate = min(mine, key=_perplexities).get("learning_rate")
        chosen = [run for run in mine if run.get("learning_rate") == rate]
        found = [run["texts"][text]["nats"] for run in chosen]
        spread = f"{min(found):.3f} to {max(found):.3f}" if len(found) > 1 else ""
        rows.append((name, f"{rate:g}" if rate else "", f"{mean(found):.3f}", spread))
    trained = next(run for run in runs if "tokens" in run)
    head = (
        f"`{runs[0]['model']}`, one scale a row (BitNet: a tensor), 8-bit inputs, "
        f"{trained['tokens']:,} tokens of distillation by the same loop, nats on {text}; each rule "
        "at the best of three learning rates, mean and range over the seeds. `search` and `gptq` "
        "say how MaQD's grid starts; the other rules start as their papers do, which is part of "
        "the difference at so few steps."
    )
    return f"{head}\n\n{table(('', 'learning rate', 'nats', 'seeds'), rows)}"


def zero_shot(result: dict[str, Any]) -> str:
    """Accuracy without examples: rows of scripts/zero_shot.py."""
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
    return f"{text}\n\n" + table(("", *(f"{task}, {what}" for task, what in columns)), rows)


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


SECTIONS: list[tuple[str, str, str, Callable[[Any], str]]] = [
    ("The main job", "main_job.json", "python scripts/qat_llm.py", main_job),
    (
        "Quality against the peers",
        "quality.json",
        "python scripts/benchmark_quality.py --data-dir ...",
        quality,
    ),
    ("Zero-shot", "zero_shot.json", "python scripts/zero_shot.py --data-dir ...", zero_shot),
    ("Speed", "speed.json", "python scripts/benchmark_speed.py", speed),
    ("Without training", "ptq-*.json", "python scripts/quantize_ptq.py", post_training),
    ("Static norms", "lbn_experiments.json", "python scripts/lbn_experiments.py", norms),
    ("Batch sizes", "lbn_batch.json", "python scripts/lbn_batch_size.py", batch_sizes),
    (
        "Static norms, pretrained",
        "lbn_pretrained.json",
        "python scripts/lbn_pretrained.py",
        pretrained_norms,
    ),
    (
        "What static norms save",
        "static_inference.json",
        "python scripts/static_inference.py",
        static_inference,
    ),
    ("Encoders", "encoders.json", "python scripts/qat_encoder.py --dataset ...", encoders),
    (
        "Architectures",
        "architectures.json",
        "python scripts/try_architectures.py",
        architectures,
    ),
    ("Block by block", "blockwise.json", "python scripts/blockwise_experiments.py", block_wise),
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
