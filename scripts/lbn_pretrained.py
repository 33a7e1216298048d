"""What static norms cost a pretrained model at 16 weight levels and 8-bit static activations.

    python scripts/lbn_pretrained.py --data_dir data                    # all tables
    python scripts/lbn_pretrained.py --data_dir data --tables stories260K --seeds 0 1 2

Every row converts one pretrained model, calibrates it and, except for SmolLM2, distils it from its
float self for the same steps on the same text; only the norms differ:

- ``per token``: no Layer-Batch Normalization, the training to compare with;
- ``static``: every norm but the final one is static (its gate opens over the first steps);
- ``static, fixed end``: the same, and the last 60 % of the steps train with the constants already;
- ``selected``: static are the norms that ``select_static_norms`` admits within ``--tolerance``
  nats before the training, the others stay per token by themselves.

``loss`` is that of the packed model on held-out text, nats a token (a text for MiniLM, on SST-2,
with its accuracy). ``choices`` is the sensitivity of every norm: its cost alone, and together with
all that were admitted before it. Results go to a JSON file after every row, and rows found there
are not repeated.

What came out, one seed: stories260K after 200 steps of 16 x 256 tokens (float 1.607, start 1.679)
reaches 1.642 with its norms per token, 1.664 with the 6 of 10 that a tolerance of 0.15 nats admits
static (+0.02), and 1.702 with all 10 (+0.06); ending with fixed statistics changes nothing here.
The cost shrinks with the training: in ``scripts/lbn_experiments.py`` all 10 cost 0.08, 0.05 and
0.04 after 0.2, 1.2 and 2.5 million tokens. SmolLM2, nothing trained: 23 of 60 norms within 0.05
nats, 0.074 on held-out text.

``data`` holds ``models/stories260K``, ``tinystories/`` and ``sst2/``; SmolLM2 and its text and
MiniLM come out of ordinary packages (``maqd_hf.embedded``).
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from qat_encoder import Job
from qat_encoder import parse as encoder_arguments
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    default_data_collator,
    set_seed,
)

from maqd_hf import MaQDConfig, pack_model, quantize_model
from maqd_hf.calibration import calibrate
from maqd_hf.callbacks import gated_norms
from maqd_hf.data import load_text, tokenize_blocks
from maqd_hf.embedded import MINILM, SMOLLM2, resolve_model
from maqd_hf.sensitivity import NormSelection, calibrate_norm_statistics, select_static_norms
from maqd_hf.trainer import MaQDTrainer, MaQDTrainingArguments

GRID: dict[str, Any] = {
    "weight_levels": 16,
    "activation_levels": 255,
    "norm_affine": "absorb",  # with the next, a static norm then leaves nothing at all
    "rotation": None,
}


@dataclass
class Arguments:
    """Command line."""

    data_dir: Path = field(metadata={"help": "Folder of models and text, see above."})
    results: Path = field(
        default=Path("results/lbn_pretrained.json"),
        metadata={"help": "JSON; rows it already holds are not repeated."},
    )
    tables: list[str] = field(default_factory=lambda: ["stories260K", MINILM, SMOLLM2])
    norms: list[str] = field(default_factory=lambda: ["per token", "static", "selected"])
    seeds: list[int] = field(default_factory=lambda: [0])
    tolerance: float = field(default=0.05, metadata={"help": "Of ``selected``, nats."})
    steps: int = field(default=300, metadata={"help": "Of stories260K: 16 x 256 tokens each."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Of stories260K."})
    encoder: str = field(default=MINILM, metadata={"help": "Of the table of that name."})
    encoder_steps: int = field(default=120, metadata={"help": "Of MiniLM: 32 texts each."})
    encoder_folder: Path = field(
        default=Path("runs/lbn-minilm"), metadata={"help": "Keeps the float classifier."}
    )


# ------------------------------------------------------------------------------ language models


@torch.no_grad()
def token_loss(model: nn.Module, blocks: Tensor) -> float:
    """Mean loss per token of (blocks, tokens), nats."""
    model.eval()
    losses = [model(input_ids=b, labels=b).loss.item() * len(b) for b in blocks.split(16)]
    return sum(losses) / len(blocks)


def selected_norms(model: nn.Module, norms: str, data: Any, tolerance: float) -> dict[str, Any]:
    """Names of the norms to open, and, where they were measured, every norm's choice."""
    gated = list(gated_norms(model))
    if norms != "selected":
        return {"gated": len(gated), "static": [] if norms == "per token" else gated}
    chosen: NormSelection = select_static_norms(model, data, tolerance, progress=False)
    print(chosen, flush=True)
    measured = {"cost": chosen.cost, "choices": chosen.to_dict()["choices"]}
    return {"gated": len(gated), "static": chosen.static, **measured}


def stories(arguments: Arguments, norms: str, seed: int) -> dict[str, Any]:
    """stories260K on TinyStories; the last 64 blocks of 256 are kept for evaluation."""
    folder = arguments.data_dir / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenized = tokenize_blocks(
        load_text(str(arguments.data_dir / "tinystories")), tokenizer, block_size=256
    )
    blocks = torch.tensor(tokenized["input_ids"])
    train, held_out = blocks[:-64], blocks[-64:]
    set_seed(seed)
    teacher: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    student = copy.deepcopy(teacher)
    quantize_model(student, MaQDConfig(**GRID), start="range")
    sample = train[torch.randperm(len(train))[:32]]
    calibrate(student, sample, smoothing=False, progress=False)
    start = token_loss(student, held_out)
    chosen = selected_norms(student, norms, sample[:8], arguments.tolerance)
    with tempfile.TemporaryDirectory() as scratch:
        training = MaQDTrainingArguments(
            output_dir=scratch,
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=arguments.learning_rate,
            scale_learning_rate=1e-4,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.steps // 20,
            lbn_norms=chosen["static"],
            lbn_fixed=0.4 if norms == "static, fixed end" else 1.0,
            quantizer_logging_steps=0,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            seed=seed,
        )
        MaQDTrainer(
            student,
            training,
            default_data_collator,
            Dataset.from_dict({"input_ids": train, "labels": train}).with_format("torch"),
            teacher=teacher,
        ).train()
    trained = token_loss(student, held_out)
    pack_model(student)
    losses = {"float": token_loss(teacher, held_out), "start": start, "trained": trained}
    return {**losses, "loss": token_loss(student, held_out), **chosen}


def smollm2(arguments: Arguments, norms: str, seed: int) -> dict[str, Any]:
    """SmolLM2-135M, groups of 64, nothing trained: 4 held-out windows of 256 tokens."""
    source = resolve_model(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(source)

    def windows(split: str, count: int) -> Tensor:
        blocks = tokenize_blocks(
            load_text("embedded", split=split), tokenizer, 256, max_tokens=256 * 400
        )
        return torch.tensor(blocks.shuffle(seed=seed)[:count]["input_ids"])

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    held_out, sample = windows("eval", 4), windows("train", 16)
    losses = {"float": token_loss(model, held_out)}
    quantize_model(model, MaQDConfig(**GRID, group_size=64), start="range")
    calibrate(model, sample, smoothing=False, progress=False)
    losses["start"] = token_loss(model, held_out)
    chosen = selected_norms(model, norms, sample[:2], arguments.tolerance)
    if norms.startswith("static"):
        calibrate_norm_statistics(model, sample[:2])
    for name in chosen["static"]:
        gated_norms(model)[name].gate.fill_(1.0)
    return {**losses, "loss": token_loss(model, held_out), **chosen}


# ------------------------------------------------------------------------------------- encoders


def minilm(arguments: Arguments, norms: str, seed: int) -> dict[str, Any]:
    """MiniLM-L6 as a classifier of SST-2, by the stages of ``scripts/qat_encoder.py``."""
    words = ["--dataset", str(arguments.data_dir / "sst2"), "--seed", str(seed)]
    words += [
        "--model",
        arguments.encoder,
        "--output_dir",
        str(arguments.encoder_folder),
        "--calibration_rows",
        "64",
    ]
    job, training = encoder_arguments([*words, "--max_steps", str(arguments.encoder_steps)])
    work = Job(job, training)
    set_seed(seed)
    teacher, _ = work.float_classifier()
    teacher.eval()
    config = MaQDConfig(**GRID, embedding_levels=255, first_token="shared")
    student = copy.deepcopy(teacher)
    quantize_model(student, config, start="range")
    batches = work.calibration_batches()
    calibrate(student, batches, smoothing=False, progress=False)
    chosen = selected_norms(student, norms, batches, arguments.tolerance)
    losses = {"float": text_loss(work, teacher), "start": text_loss(work, student)}
    work.distil(student, teacher, GRID["weight_levels"], chosen["static"])
    losses["trained"] = text_loss(work, student)
    pack_model(student)
    accuracy = {
        "float_accuracy": work.accuracy(work.predict(teacher)),
        "accuracy": work.accuracy(work.predict(student)),
    }
    return {**losses, "loss": text_loss(work, student), **accuracy, **chosen}


@torch.no_grad()
def text_loss(work: Job, model: PreTrainedModel) -> float:
    """Mean cross entropy of the held-out texts, nats."""
    model.eval()
    texts, labels, total = work.held_out["text"][:], work.held_out["label"][:], 0.0
    for start in range(0, len(texts), 32):
        inputs = work.tokenizer(
            texts[start : start + 32],
            padding=True,
            truncation=True,
            max_length=work.job.max_length,
            return_tensors="pt",
        )
        target = torch.tensor(labels[start : start + 32])
        logits = model(**inputs).logits.float()
        total += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
    return total / len(texts)


# ------------------------------------------------------------------------------------ the whole

TABLES = {"stories260K": stories, MINILM: minilm, SMOLLM2: smollm2}


def summary(rows: list[dict[str, Any]]) -> str:
    """One line a row."""
    lines = [f"{'model':<24}{'norms':<12}{'seed':>5}{'float':>8}{'start':>8}{'loss':>8}  static"]
    for row in rows:
        numbers = "".join(f"{row[key]:>8.3f}" for key in ("float", "start", "loss"))
        lines.append(
            f"{row['model']:<24}{row['norms']:<12}{row['seed']:>5}{numbers}"
            f"  {len(row['static'])} of {row['gated']}"
        )
    return "\n".join(lines)


def main(arguments: Arguments) -> list[dict[str, Any]]:
    """Measure what the results file does not hold yet, write it after every row."""
    path = arguments.results
    rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    trained: dict[str, dict[str, Any]] = {
        "stories260K": {"steps": arguments.steps, "learning_rate": arguments.learning_rate},
        MINILM: {"steps": arguments.encoder_steps},
        SMOLLM2: {"steps": 0},
    }
    wanted = [
        (table, norms, seed)
        for table in arguments.tables
        for seed in arguments.seeds
        for norms in arguments.norms
    ]
    for table, norms, seed in wanted:
        key: dict[str, Any] = {"model": table, "norms": norms, "seed": seed, **trained[table]}
        key |= {"tolerance": arguments.tolerance} if norms == "selected" else {}
        if any(key.items() <= row.items() for row in rows):
            continue
        began = time.perf_counter()
        found = TABLES[table](arguments, norms, seed)
        rows.append({**key, **found, "seconds": round(time.perf_counter() - began)})
        path.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
        print(summary(rows), flush=True)
    return rows


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    main(parsed)
