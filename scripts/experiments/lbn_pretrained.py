"""The cost of static norms in a pretrained model, at 16 weight levels and 8-bit static activations.

    python -m scripts.experiments.lbn_pretrained --data-dir data                    # all tables
    python -m scripts.experiments.lbn_pretrained --data-dir data --tables stories260K --seeds 0 1 2

Every row converts one pretrained model, calibrates it and distils it from its float self for the
same optimizer steps on the same text; only the norms differ:

- ``per token``: no Layer-Batch Normalization, the training to compare with;
- ``static``: every norm but the final one becomes static (its gate opens over the first steps);
- ``static, fixed end``: the same, and for the last 60 % of the steps these norms are fixed;
- ``selected``: the norms that ``select_static_norms`` admits within ``--tolerance`` nats before the
  training become static, the others stay per token.

``loss`` is that of the packed model on held-out text, nats a token (a text for MiniLM, on SST-2,
with its accuracy). ``choices`` is the sensitivity of every norm: its cost alone, and together with
all that were admitted before it. Results go to a JSON file after every row, and rows found there
are not repeated.

After 65,536 tokens SmolLM2 has 3.517 nats per token, 3.520 with the 17 of 60 norms static that 0.05
nats admit, and 6.519 with all 60 (notebook: "Static norms in pretrained models, trained").

``data`` holds ``models/stories260K``, ``tinystories/`` and ``sst2/``; SmolLM2 and its text and
MiniLM come out of ordinary packages (``maqd_hf.data.bundled``).
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
from maqd_hf.calibration.static_norms import (
    NormSelection,
    calibrate_norm_statistics,
    select_static_norms,
)
from maqd_hf.data.bundled import MINILM, SMOLLM2, resolve_model
from maqd_hf.data.text import load_text, tokenize_blocks
from maqd_hf.models.finding import gated_norms
from maqd_hf.nn.modes import evaluating
from maqd_hf.nn.precision import fast_bf16
from maqd_hf.training.trainer import MaQDTrainer, MaQDTrainingArguments
from scripts.bench.report.targets import static_norm_targets
from scripts.qat_encoder import Job
from scripts.qat_encoder import parse as encoder_arguments

GRID: dict[str, Any] = {
    "weight_levels": 16,
    "activation_levels": 255,
    "norm_affine": "fold",  # with the next, a static norm then leaves nothing at all
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
    tolerance: float = field(default=0.05, metadata={"help": "For ``selected``, in nats."})
    steps: int = field(
        default=300, metadata={"help": "Optimizer steps of stories260K, 16 x 256 tokens each."}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "Learning rate of stories260K."})
    llm_steps: int = field(
        default=256,
        metadata={"help": "Optimizer steps of SmolLM2, 256 tokens each; 0: measured untrained."},
    )
    encoder: str = field(default=MINILM, metadata={"help": "The encoder of MiniLM's table."})
    encoder_steps: int = field(
        default=120, metadata={"help": "Optimizer steps of MiniLM, 32 texts each."}
    )
    encoder_folder: Path = field(
        default=Path("runs/lbn-minilm"), metadata={"help": "Keeps the float classifier."}
    )


# ------------------------------------------------------------------------------ language models


def token_loss(model: nn.Module, blocks: Tensor) -> float:
    """The mean loss per token of ids (blocks, tokens), in nats."""
    with evaluating(model):
        losses = [model(input_ids=b, labels=b).loss.item() * len(b) for b in blocks.split(16)]
    return sum(losses) / len(blocks)


def selected_norms(model: nn.Module, norms: str, data: Any, tolerance: float) -> dict[str, Any]:
    """The names of the norms to open and, where they were measured, every norm's choice."""
    gated = list(gated_norms(model))
    if norms != "selected":
        return {"gated": len(gated), "static": [] if norms == "per token" else gated}
    chosen: NormSelection = select_static_norms(model, data, tolerance, progress=False)
    print(chosen, flush=True)
    measured = {"cost": chosen.cost, "choices": chosen.to_dict()["choices"]}
    return {"gated": len(gated), "static": chosen.static, **measured}


@dataclass
class Text:
    """The text of a language model, ids (blocks, tokens), and how it trains on it."""

    train: Tensor
    held_out: Tensor
    steps: int
    batch_size: int
    learning_rate: float | None  # None: that of `maqd_hf.training.rates`, and the scales' too
    group_size: int | None = None
    judged: int = 8  # blocks that `select_static_norms` looks at
    bf16: bool = False


def stories(arguments: Arguments) -> tuple[str, Text]:
    """stories260K on TinyStories; the last 64 blocks of 256 are kept for evaluation."""
    folder = str(arguments.data_dir / "models" / "stories260K")
    text = load_text(str(arguments.data_dir / "tinystories"))
    tokenized = tokenize_blocks(text, AutoTokenizer.from_pretrained(folder), block_size=256)
    blocks = torch.tensor(tokenized["input_ids"])
    return folder, Text(blocks[:-64], blocks[-64:], arguments.steps, 16, arguments.learning_rate)


def smollm2(arguments: Arguments) -> tuple[str, Text]:
    """SmolLM2-135M, groups of 64, on the embedded articles; 16 held-out blocks of 256."""
    folder = resolve_model(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def blocks(split: str) -> Tensor:
        found = tokenize_blocks(load_text("embedded", split=split), tokenizer, 256)
        return torch.tensor(found.shuffle(seed=0)["input_ids"])

    held_out = blocks("eval")[:16]
    bf16 = fast_bf16("cuda" if torch.cuda.is_available() else "cpu")
    return folder, Text(blocks("train"), held_out, arguments.llm_steps, 1, None, 64, 2, bf16)


def language_model(
    arguments: Arguments, norms: str, seed: int, folder: str, text: Text
) -> dict[str, Any]:
    """Train and measure one row of a language model's table."""
    set_seed(seed)
    teacher: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    student = copy.deepcopy(teacher)
    quantize_model(student, MaQDConfig(**GRID, group_size=text.group_size), start="range")
    sample = text.train[torch.randperm(len(text.train))[:32]]
    calibrate(student, sample, smoothing=False, progress=False)
    start = token_loss(student, text.held_out)
    chosen = selected_norms(student, norms, sample[: text.judged], arguments.tolerance)
    if text.steps:
        distill(student, teacher, norms, seed, text, chosen["static"])
    else:
        if norms.startswith("static"):
            calibrate_norm_statistics(student, sample[: text.judged])
        for name in chosen["static"]:
            gated_norms(student)[name].gate.fill_(1.0)
    trained = token_loss(student, text.held_out)
    pack_model(student)
    losses = {"float": token_loss(teacher, text.held_out), "start": start, "trained": trained}
    return {**losses, "loss": token_loss(student, text.held_out), **chosen}


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    norms: str,
    seed: int,
    text: Text,
    static: list[str],
) -> None:
    """Train ``student`` on what ``teacher`` predicts, the norms ``static`` moving to constants."""
    with tempfile.TemporaryDirectory() as scratch:
        training = MaQDTrainingArguments(
            output_dir=scratch,
            max_steps=text.steps,
            per_device_train_batch_size=text.batch_size,
            learning_rate=text.learning_rate,
            scale_learning_rate=None if text.learning_rate is None else 1e-4,
            lr_scheduler_type="cosine",
            warmup_steps=text.steps // 20,
            lbn_norms=static,
            lbn_fixed=0.4 if norms == "static, fixed end" else 1.0,
            quantizer_logging_steps=0,
            save_strategy="no",
            report_to="none",
            bf16=text.bf16,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            seed=seed,
        )
        rows = {"input_ids": text.train, "labels": text.train}
        MaQDTrainer(
            student,
            training,
            default_data_collator,
            Dataset.from_dict(rows).with_format("torch"),
            teacher=teacher,
        ).train()


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
    work.distill(student, teacher, GRID["weight_levels"], chosen["static"])
    losses["trained"] = text_loss(work, student)
    pack_model(student)
    accuracy = {
        "float_accuracy": work.accuracy(work.predict(teacher)),
        "accuracy": work.accuracy(work.predict(student)),
    }
    return {**losses, "loss": text_loss(work, student), **accuracy, **chosen}


def text_loss(work: Job, model: PreTrainedModel) -> float:
    """The mean cross entropy of the held-out texts, in nats."""
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
        with evaluating(model):
            logits = model(**inputs).logits.float()
        total += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
    return total / len(texts)


# ------------------------------------------------------------------------------------ the whole

LANGUAGE_MODELS = {"stories260K": stories, SMOLLM2: smollm2}


def summary(rows: list[dict[str, Any]]) -> str:
    """The rows as text, one line each."""
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
        SMOLLM2: {"steps": arguments.llm_steps},
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
        if table == MINILM:
            found = minilm(arguments, norms, seed)
        else:
            found = language_model(arguments, norms, seed, *LANGUAGE_MODELS[table](arguments))
        rows.append({**key, **found, "seconds": round(time.perf_counter() - began)})
        path.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
        print(summary(rows), flush=True)
    for target in static_norm_targets(rows):
        print(" | ".join(target.cells()))
    return rows


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    main(parsed)
