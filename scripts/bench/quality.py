"""The quality at equal bits of float, round-to-nearest, other packages, other rules and MaQD.

    python -m scripts.bench.quality                          # embedded model and text
    python -m scripts.bench.quality --data-dir data --tokens 65536
    python -m scripts.bench.quality --data-dir data --rows "MaQD*" "HQQ 4 bit*"
    python -m scripts.bench.quality --data-dir data --table rules --batch_size 4

Every row of table ``llm`` starts from the same float model, keeps embedding and output head in
float, and is measured on the same windows of two texts; what is calibrated or trained sees the same
blocks of the same text, in the same order. Trained rows are distilled from the float model by one
and the same loop: MaQD, other rules (`quality_rules`) and torchao's QAT. Peers (`quality_peers`)
run through their own packages, ``pip install maqd_hf[bench]``; one that is not installed, or fails,
is named in the file with its reason. This measures quality; ``scripts.bench.speed`` measures speed.

Table ``rules`` puts MaQD beside the other rules on a small model, three seeds: each rule has the
best of its learning rates, found on the first seed. It needs ``--data-dir``.

Results go to a JSON file after every run, and runs found there are not repeated. With
``--checkpoints`` a training that was cut off goes on from its last checkpoint. ``--data-dir`` holds
``wikitext-2/``, ``wiki-sample/``, ``imdb/`` (llm), ``tinystories/`` and ``models/stories260K``
(rules); without it the embedded articles are used for training (nine tenths) and measuring (the
rest).
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedModel,
    default_data_collator,
    set_seed,
)

from maqd_hf import MaQDConfig, model_size, pack_model, quantize_model
from maqd_hf.calibration import calibrate
from maqd_hf.checkpoint.saving import save_model
from maqd_hf.evaluation.model_card import write_card
from maqd_hf.evaluation.versions import package_versions
from maqd_hf.nn.precision import fast_bf16
from maqd_hf.training.trainer import MaQDTrainer, MaQDTrainingArguments, last_complete_checkpoint
from scripts.bench.quality_peers import PEERS, finish_qat, quantize_peer
from scripts.bench.quality_rules import RULES, RoundLatents, apply_rule
from scripts.bench.quality_task import TABLES, Arguments, Row, Task, remembering
from scripts.bench.report.targets import quality_targets

# ------------------------------------------------------------------------------------ one row


def quantized(row: Row, task: Task) -> PreTrainedModel:
    """The float model quantized by MaQD; its start values are kept for the next row with them."""
    config = MaQDConfig(
        weight_levels=row.levels,
        group_size=row.group,
        activation_levels=row.activations,
        activation_scaling=row.scaling,
        layer_batch_norm=False,
        norm_affine=row.norm_affine,
        rotation=row.rotation,
        surrogate=row.surrogate,
        weight_offset=row.weight_offset,
        first_token=row.first_token,
    )
    # the surrogate is in gradients alone: rows that differ in it start from the same values
    key = (replace(config, surrogate="clip"), row.start, row.smoothing, row.own_text)
    kept = task.started[1] if task.started is not None and task.started[0] == key else None
    model = copy.deepcopy(task.teacher)
    search = row.start == "search" and kept is None
    quantize_model(model, config, start="search" if search else "range")
    if kept is not None:
        model.load_state_dict(kept)
        return model
    gptq = row.start == "gptq"
    if gptq or row.scaling == "static":
        ids = task.calibration_ids(row)
        calibrate(model, ids, gptq_weights=gptq, smoothing=gptq and row.smoothing)
    task.started = (key, copy.deepcopy(model.state_dict()))
    return model


def start(row: Row, task: Task) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model before training, and its bits a weight."""
    if row.method == "MaQD":
        model = quantized(row, task)
        return model, {"bits_per_weight": model_size(model).bits_per_quantized_weight}
    model = copy.deepcopy(task.teacher)
    if row.method == "float":
        return model, {"bits_per_weight": 32.0}
    assert row.levels is not None, f"row {row.name!r} needs levels"
    if row.method in RULES:
        apply_rule(model, row.method, row.levels, row.group)
        scales = 16 / row.group if row.group else 32 / model.config.hidden_size  # as our own
        scales = 0 if row.method == "BitNet" else scales
        return model, {"bits_per_weight": math.log2(row.levels) + scales}
    assert row.group is not None, f"row {row.name!r} needs a group"
    bits = row.levels.bit_length() - 1
    ids = task.calibration_ids(row)
    stored = quantize_peer(row.method, model, bits, row.group, ids, task.folder)
    return model, {"bits_per_weight": stored}


def go_on(row: Row, checkpoints: Path | None) -> tuple[PreTrainedModel, dict[str, Any]] | None:
    """As `start`, from the last checkpoint: it holds everything that the calibration has set."""
    last = last_complete_checkpoint(checkpoints) if checkpoints else None
    if row.method != "MaQD" or last is None:
        return None
    model = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32)
    return model, {"bits_per_weight": model_size(model).bits_per_quantized_weight}


class AnyLayersTrainer(MaQDTrainer):
    """The same loop for the layers of others, which the rows of peers and rules have."""

    requires_quantized = False


def training_arguments(
    row: Row, task: Task, rate: float, seed: int, folder: str, checkpoints: bool
) -> MaQDTrainingArguments:
    """How every trained row is trained; ``checkpoints`` says whether some are saved."""
    args = task.args
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return MaQDTrainingArguments(
        output_dir=folder,
        max_steps=max(1, args.tokens // (args.batch_size * args.block_size)),
        per_device_train_batch_size=args.batch_size,
        learning_rate=rate,
        scale_learning_rate=row.scale_rate * rate,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        adam_beta2=0.95,
        logging_steps=1,
        quantizer_logging_steps=0,
        save_strategy="steps" if checkpoints else "no",
        save_steps=args.save_steps,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=task.small,
        bf16=not task.small and fast_bf16(device),
        use_cpu=device == "cpu",
        dataloader_pin_memory=False,
        seed=seed,
        data_seed=seed,
    )


def distill(
    model: PreTrainedModel,
    row: Row,
    task: Task,
    rate: float,
    seed: int,
    checkpoints: Path | None = None,
) -> dict[str, Any]:
    """Train ``model`` on the float model's predictions; returns the loss of every optimizer step.

    ``checkpoints`` is a folder for checkpoints; training goes on from the last one in there.
    """
    for kept in (model.get_input_embeddings(), model.get_output_embeddings()):
        kept.requires_grad_(False)
    place = nullcontext(str(checkpoints)) if checkpoints else tempfile.TemporaryDirectory()
    with place as folder, remembering(task.teacher, task.said):
        training = training_arguments(row, task, rate, seed, folder, checkpoints is not None)
        trainer = AnyLayersTrainer(
            model=model,
            args=training,
            teacher=task.teacher,
            train_dataset=task.blocks_for(row),
            data_collator=default_data_collator,
            callbacks=[RoundLatents()] if row.bfloat16_latents else None,
        )
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.eval()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"loss": losses, "bf16": training.bf16}


def run_row(
    row: Row,
    task: Task,
    seed: int,
    rate: float | None,
    base: dict[str, Any] | None = None,
    others: Sequence[dict[str, Any]] = (),
    checkpoints: Path | None = None,
) -> dict[str, Any]:
    """Quantize, train if wanted, and measure one row.

    ``base`` is the float model's run, for the card; ``others`` are runs of this row at other rates,
    and only a model better than theirs is kept; ``checkpoints`` as in `distill`.
    """
    set_seed(seed)
    began = time.perf_counter()
    model, found = go_on(row, checkpoints) or start(row, task)
    if rate is not None:
        found |= distill(model, row, task, rate, seed, checkpoints)
    if "QAT" in row.method:
        model = finish_qat(model)
    found["seconds"] = round(time.perf_counter() - began)
    found["texts"] = task.measure(model)
    models = task.args.models if row.method == "MaQD" and not task.small else None
    if rate is not None and models and all(nats(found) < nats(other) for other in others):
        publish(row, task, model, found | {"rate": rate}, base, models)
    return found


def publish(
    row: Row,
    task: Task,
    model: Any,
    found: dict[str, Any],
    base: dict[str, Any] | None,
    models: Path,
) -> None:
    """Pack a trained model and keep it in ``models``, measured once more, with a card."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{task.name} {row.name}".lower())
    folder = models / name
    report = pack_model(model)
    save_model(model, folder / "model", task.tokenizer)
    evaluations = []
    for text, values in task.measure(model).items():
        full = base["texts"][text]["perplexity"] if base else None
        measured = {"float": full, "packed": values["perplexity"]}
        evaluations.append({"text": text, "values": measured, "protocol": values["protocol"]})
    training = {
        "calibration_tokens": task.calibration_ids(row).numel(),
        "tokens": task.args.tokens,
        "steps": len(found["loss"]),
        "bf16": found["bf16"],
        "learning_rate": found["rate"],
    }
    record = {
        "model_id": name,
        "base_model": task.name,
        "command": f"python -m scripts.bench.quality --tokens {task.args.tokens} "
        f'--samples {task.args.samples} --rows "{row.name}" --data-dir ... --models ...',
        "versions": package_versions(),
        "evaluations": evaluations,
        "bits_per_weight": report.bits_per_weight,
        "packed_bytes": sum(f.stat().st_size for f in (folder / "model").glob("*.safetensors")),
        "float_bytes": 2 * sum(p.numel() for p in task.teacher.parameters()),
        "training": training,
        "report": str(report),
    }
    (folder / "metrics.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    write_card(folder)


# ------------------------------------------------------------------------------------ all rows


class Results:
    """The results file: runs, peers that did not run, versions; written after every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        stored = json.loads(path.read_text("utf-8")) if path.exists() else {}
        self.runs: list[dict[str, Any]] = stored.get("runs", [])
        self.missing: dict[str, str] = stored.get("missing", {})

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The run with this key; None where there is none."""
        return next((run for run in self.runs if key.items() <= run.items()), None)

    def write(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"versions": package_versions(), "missing": self.missing, "runs": self.runs}
        text = json.dumps(content, indent=1)
        self.path.write_text(_flat_lists(text) + "\n", "utf-8")


def _flat_lists(text: str) -> str:
    """JSON with every list of numbers on one line: a loss curve has hundreds of values."""
    return re.sub(r"\[[\d\s.,eE+-]+\]", lambda found: "".join(found[0].split()), text)


def nats(run: dict[str, Any]) -> float:
    """A run's mean loss over the texts, in nats."""
    return sum(text["nats"] for text in run["texts"].values()) / len(run["texts"])


def run_all_of(row: Row, task: Task, results: Results) -> None:
    """Run a row with every learning rate on the first seed, with the best on the others."""

    base = results.find(task.key(TABLES[task.table][0], 0, None))  # the float model

    first: list[dict[str, Any]] = []  # runs of the first seed, one for each learning rate

    def once(seed: int, rate: float | None) -> dict[str, Any]:
        key = task.key(row, seed, rate)
        run = results.find(key)
        if run is None:
            kept = None if rate is None else task.checkpoints(key)
            run = {**key, **run_row(row, task, seed, rate, base, first, kept)}
            results.runs.append(run)
            results.missing.pop(row.name, None)
            results.write()
            if kept:
                shutil.rmtree(kept, ignore_errors=True)
            values = ", ".join(f"{t} {v['perplexity']:.3f}" for t, v in run["texts"].items())
            print(f"{row.name} (seed {seed}, rate {rate}): {values}", flush=True)
        return run

    if not row.trained:
        once(task.seeds[0], None)
        return
    for rate in row.learning_rates:
        first.append(once(task.seeds[0], rate))
    best = min(first, key=nats)["learning_rate"]
    for seed in task.seeds[1:]:
        once(seed, best)


def summarize(results: Results) -> str:
    """All runs as a table of perplexities."""
    lines = []
    for run in results.runs:
        values = "".join(f"{name:>12} {t['perplexity']:9.3f}" for name, t in run["texts"].items())
        lines.append(f"{run['name']:<36}{run['bits_per_weight']:>7.3f} bit{values}")
    lines += [f"missing: {name}: {reason}" for name, reason in results.missing.items()]
    lines += [" | ".join(target.cells()) for target in quality_targets(results.runs)]
    return "\n".join(lines)


def main(args: Arguments) -> Results:
    """Run what the results file does not hold yet, write it after every run, print the table."""
    results = Results(args.results)
    for table in args.table:
        if table == "rules" and args.data_dir is None:
            print("table 'rules' skipped: it needs --data-dir")
            continue
        rows = TABLES[table]
        chosen = [r for pattern in args.rows for r in rows if fnmatchcase(r.name, pattern)]
        task = Task(table, args)
        for row in dict.fromkeys([rows[0], *chosen]):  # float always: the others are read beside it
            try:
                run_all_of(row, task, results)
            except Exception as error:
                if row.method not in PEERS:
                    raise
                results.missing[row.name] = f"{type(error).__name__}: {error}"[:300]
                results.write()
                print(f"{row.name} did not run: {results.missing[row.name]}", flush=True)
    print(summarize(results))
    return results


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    main(parsed)
