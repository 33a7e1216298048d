"""Fine-tune an encoder as a classifier, quantize it, distill it, pack it: one row per grid.

    python scripts/qat_encoder.py --dataset data/sst2 --weight_levels 16 4 3
    python scripts/qat_encoder.py --dataset data/imdb/train.parquet --train_rows 6000 \\
        --eval_rows 2000 --weight_levels 16 --activation_levels 255 15 --output_dir runs/imdb
    python scripts/qat_encoder.py --model someone/a-classifier --dataset someone/some-reviews

The default model is the MiniLM-L6 of an ordinary package (`maqd_hf.data.bundled`). A model that has
a classification head already is taken as it is, any other is fine-tuned first. The run directory
holds the float classifier (float/), which a later run with the same settings takes from there, and
each packed model (w16-a255/, ...). Rows are added to ``--results``; one with the same settings is
replaced. All accuracies are of `evaluate` on the same held-out rows.
"""

from __future__ import annotations

if not __package__:  # run as a file: scripts/__init__.py has not done it
    import torch_environment  # noqa: F401  (before torch)

import copy
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import evaluate
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import maqd_hf.metrics
from maqd_hf import MaQDConfig, model_size, pack_model, quantize_model
from maqd_hf.calibration import calibrate
from maqd_hf.calibration.static_norms import TOLERANCE, select_static_norms
from maqd_hf.checkpoint.saving import save_model
from maqd_hf.data.bundled import MINILM, resolve_model
from maqd_hf.data.text import load_labeled
from maqd_hf.evaluation.classification import classify
from maqd_hf.evaluation.versions import package_versions
from maqd_hf.nn.precision import fast_bf16
from maqd_hf.training.trainer import MaQDTrainer, MaQDTrainingArguments

LEARNING_RATES = ((3, 3e-4), (4, 2e-4), (256, 1e-4))  # rates for up to so many levels


@dataclass
class JobArguments:
    """The texts to classify, the encoder and its grids."""

    dataset: str = field(metadata={"help": "File, folder or Hub id of texts with class numbers."})
    model: str = field(default=MINILM, metadata={"help": "Hub id, folder or embedded name."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(
        default="validation",
        metadata={"help": "Held-out split; of a single file, eval_rows are held out instead."},
    )
    text_column: str | None = field(default=None, metadata={"help": "Default: the obvious one."})
    label_column: str = field(default="label", metadata={"help": "Column of class numbers."})
    train_rows: int | None = field(default=None, metadata={"help": "At most; default: all."})
    eval_rows: int | None = field(default=None, metadata={"help": "At most; default: all."})
    max_length: int = field(default=128, metadata={"help": "Tokens at which texts are cut."})
    weight_levels: list[int] = field(
        default_factory=lambda: [16, 4], metadata={"help": "Levels of a weight (16 = 4 bit)."}
    )
    activation_levels: list[int] = field(
        default_factory=lambda: [255], metadata={"help": "Levels of a layer's input."}
    )
    group_size: int | None = field(default=None, metadata={"help": "Inputs that share a scale."})
    embedding_levels: int | None = field(default=255, metadata={"help": "Levels of embeddings."})
    lbn_tolerance: float = field(
        default=TOLERANCE, metadata={"help": "Norms become static up to this loss (nats a text)."}
    )
    calibration_rows: int = field(default=256, metadata={"help": "Training texts for the start."})
    float_epochs: float = field(default=4.0, metadata={"help": "Epochs of the float model."})
    float_learning_rate: float = field(default=1e-4, metadata={"help": "Its learning rate."})
    qat_learning_rate: float | None = field(
        default=None, metadata={"help": "Default: 3e-4 ternary, 2e-4 at 4 levels, else 1e-4."}
    )
    results: str | None = field(default=None, metadata={"help": "JSON file that collects rows."})

    def learning_rate(self, levels: int) -> float:
        """The learning rate of latents on a grid of ``levels``."""
        found = next(rate for most, rate in LEARNING_RATES if levels <= most)
        return self.qat_learning_rate or found


class Job:
    """The job: data, tokenizer and float classifier, and measurements with them."""

    def __init__(self, job: JobArguments, training: MaQDTrainingArguments) -> None:
        self.job, self.training = job, training
        self.folder = Path(str(training.output_dir))
        source = resolve_model(job.model)
        self.finetuned = is_classifier(source)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.train, self.held_out = load_rows(job, training.seed)
        self.tokens = self.train.map(
            lambda batch: self.tokenizer(
                batch["text"], truncation=True, max_length=job.max_length, return_length=True
            ),
            batched=True,
            remove_columns="text",
            desc="tokenizing",
        ).rename_column("label", "labels")
        self.collate = DataCollatorWithPadding(self.tokenizer)

    def predict(self, model: PreTrainedModel) -> list[int]:
        """The class of every held-out text."""
        length = self.job.max_length
        found = classify(model, self.tokenizer, self.held_out["text"], max_length=length)
        return found.classes

    def accuracy(self, classes: list[int]) -> float:
        """The share of held-out texts with the right class."""
        return agreement(classes, self.held_out["label"])

    def float_classifier(self) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The float classifier and the record of its fine-tuning, which is done unless it was."""
        job, folder = self.job, self.folder / "float"
        if self.finetuned:
            return load(resolve_model(job.model)), {"seconds": 0.0}
        asked = {
            key: getattr(job, key)
            for key in ("model", "dataset", "train_rows", "max_length", "float_epochs")
        } | {"learning_rate": job.float_learning_rate, "seed": self.training.seed}
        record = folder / "fine_tuning.json"
        if record.exists():
            known = json.loads(record.read_text("utf-8"))
            if known["asked"] != asked:
                raise SystemExit(f"{folder} was trained with other settings: {known['asked']}")
            return load(folder), known
        began = time.perf_counter()
        labels = max(self.train["label"]) + 1
        model = load(resolve_model(job.model), num_labels=labels)
        args = self.arguments(job.float_learning_rate, num_train_epochs=job.float_epochs)
        Trainer(model, args, self.collate, self.tokens, processing_class=self.tokenizer).train()
        save_model(model, folder, self.tokenizer)
        known = {"asked": asked, "seconds": round(time.perf_counter() - began, 1)}
        record.write_text(json.dumps(known, indent=2) + "\n", "utf-8")
        return model, known

    def arguments(self, learning_rate: float, **changes: Any) -> MaQDTrainingArguments:
        """The training arguments with another learning rate."""
        args = copy.copy(self.training)
        for key, value in {"learning_rate": learning_rate, **changes}.items():
            setattr(args, key, value)
        return args

    def calibration_batches(self) -> list[Any]:
        """Padded batches of training texts, for the start values."""
        chosen = self.tokens.select(range(min(self.job.calibration_rows, len(self.tokens))))
        known = [c for c in chosen.column_names if c in self.tokenizer.model_input_names]
        return list(DataLoader(chosen.select_columns(known), 32, collate_fn=self.collate))

    def start(self, teacher: PreTrainedModel, config: MaQDConfig) -> tuple[PreTrainedModel, Any]:
        """The converted and calibrated model, and the norms of it that can be static."""
        student = copy.deepcopy(teacher)
        print(quantize_model(student, config, start="range"))  # calibrate searches the grids
        batches = self.calibration_batches()
        print(calibrate(student, batches))
        chosen = select_static_norms(student, batches[:2], self.job.lbn_tolerance)
        print(chosen)
        return student, chosen

    def distill(
        self, student: PreTrainedModel, teacher: PreTrainedModel, levels: int, norms: list[str]
    ) -> MaQDTrainer:
        """Train the quantized model on the float one's answers; returns the trainer."""
        trainer = MaQDTrainer(
            student,
            self.arguments(self.job.learning_rate(levels), lbn_norms=norms),
            self.collate,
            self.tokens,
            processing_class=self.tokenizer,
            teacher=teacher,
        )
        trainer.train()
        # accelerate leaves its bfloat16 autocast around the forward: measure in float32
        trainer.accelerator.unwrap_model(student, keep_fp32_wrapper=False)
        return trainer

    def run(self, teacher: Any, said: list[int], weights: int, activations: int) -> dict[str, Any]:
        """One grid, from the float classifier to the reloaded packed model."""
        folder = self.folder / f"w{weights}-a{activations}"
        set_seed(self.training.seed)
        began = time.perf_counter()
        config = MaQDConfig(
            weight_levels=weights,
            activation_levels=activations,
            group_size=self.job.group_size,
            embedding_levels=self.job.embedding_levels,
            first_token="shared",  # nothing piles up on an encoder's first token
        )
        student, norms = self.start(teacher, config)
        start, calibrated = self.predict(student), time.perf_counter()
        trainer = self.distill(student, teacher, weights, norms.static)
        seconds = {"start": calibrated - began, "training": time.perf_counter() - calibrated}
        trained = self.predict(student)
        pack_model(student)
        save_model(student, folder, self.tokenizer)
        packed = load(folder)
        final = self.predict(packed)
        stages = {"float": said, "start": start, "trained": trained, "packed": final}
        return {
            **self.asked(weights, activations),
            **self.training_record(trainer),
            "norms": {"static": norms.static, "per_token": norms.per_token, "cost": norms.cost},
            "accuracy": {name: self.accuracy(classes) for name, classes in stages.items()},
            "agreement_with_float": agreement(final, said),
            "bits_per_weight": model_size(packed).bits_per_weight,
            "file_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
            "float_bytes": 4 * sum(p.numel() for p in teacher.parameters()),
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
        }

    def asked(self, weights: int, activations: int) -> dict[str, Any]:
        """The settings that tell a row of the table from the others."""
        keys = ("model", "dataset", "max_length", "group_size", "embedding_levels")
        return {key: getattr(self.job, key) for key in keys} | {
            "train_rows": len(self.train),
            "eval_rows": len(self.held_out),
            "seed": self.training.seed,
            "weight_levels": weights,
            "activation_levels": activations,
        }

    def training_record(self, trainer: MaQDTrainer) -> dict[str, Any]:
        """The training of the quantized model, and the packages it was done with."""
        args, epochs = trainer.args, trainer.state.epoch or 0.0
        return {
            "learning_rate": args.learning_rate,
            "batch_size": args.train_batch_size * args.gradient_accumulation_steps,
            "logits_distillation": args.distillation_weight,
            "hidden_distillation": args.hidden_distillation,
            "steps": trainer.state.global_step,
            "epochs": epochs,
            "examples": round(epochs * len(self.train)),
            "tokens": round(epochs * sum(self.tokens["length"])),
            "bf16": args.bf16,
            "versions": package_versions(),
        }


def is_classifier(source: str) -> bool:
    """Whether the checkpoint has a classification head."""
    names = AutoConfig.from_pretrained(source).architectures or []
    return any(name.endswith("ForSequenceClassification") for name in names)


def load(source: str | Path, **options: Any) -> Any:
    """The classifier of a checkpoint, in float32 or packed."""
    auto = AutoModelForSequenceClassification
    return auto.from_pretrained(source, dtype=torch.float32, **options)


def load_rows(job: JobArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out texts, shuffled; no text stands in both."""

    def split(name: str) -> Dataset:
        return load_labeled(
            job.dataset,
            split=name,
            text_column=job.text_column,
            label_column=job.label_column,
            config_name=job.dataset_config_name,
        )

    train = split(job.train_split).shuffle(seed=seed)
    if Path(job.dataset).is_file():
        if not job.eval_rows or job.eval_rows >= len(train):
            raise SystemExit(
                f"{job.dataset} is one file of {len(train)} rows: say with --eval_rows how many "
                "of them to hold out"
            )
        parts = train.train_test_split(job.eval_rows, seed=seed)
        train, held_out = parts["train"], parts["test"]
    else:
        held_out = split(job.eval_split)
        held_out = held_out.select(range(min(len(held_out), job.eval_rows or len(held_out))))
    known = set(held_out["text"])
    train = train.filter(lambda row: row["text"] not in known, desc="held-out texts out")
    return train.select(range(min(len(train), job.train_rows or len(train)))), held_out


def agreement(classes: list[int], others: list[int]) -> float:
    """The share of equal classes, by `evaluate`."""
    metric = evaluate.load(maqd_hf.metrics.path("accuracy"))
    found: float = metric.compute(predictions=classes, references=others)["accuracy"]
    return found


def add_row(path: Path, row: dict[str, Any], asked: Iterable[str]) -> None:
    """Add ``row`` to a JSON list, in the place of one that was ``asked`` the same."""
    rows = json.loads(path.read_text("utf-8")) if path.exists() else []
    same = [i for i, old in enumerate(rows) if all(old.get(key) == row[key] for key in asked)]
    place = same[0] if same else len(rows)
    rows[place : place + 1] = [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=2) + "\n", "utf-8")


def summary(rows: list[dict[str, Any]]) -> str:
    """The closing table, accuracies in per cent."""
    header = ("levels", "float", "start", "trained", "packed", "agree", "static", "bits", "MiB")
    lines: list[Sequence[str]] = [header]
    for row in rows:
        shares = [*row["accuracy"].values(), row["agreement_with_float"]]
        lines.append(
            (
                f"W{row['weight_levels']} A{row['activation_levels']}",
                *(f"{100 * share:.2f}" for share in shares),
                str(len(row["norms"]["static"])),
                f"{row['bits_per_weight']:.2f}",
                f"{row['file_bytes'] / 2**20:.1f}",
            )
        )
    return "\n".join("".join(cell.rjust(10) for cell in line) for line in lines)


def parse(arguments: list[str] | None = None) -> tuple[JobArguments, MaQDTrainingArguments]:
    """The arguments of a command line."""
    parser = HfArgumentParser([JobArguments, MaQDTrainingArguments])  # type: ignore[list-item]
    grouped = hasattr(TrainingArguments, "train_sampling_strategy")  # a flag in transformers 5.0
    by_length = {"train_sampling_strategy": "group_by_length"} if grouped else {}
    parser.set_defaults(
        output_dir="runs/encoder",
        num_train_epochs=3.0,
        per_device_train_batch_size=32,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        bf16=fast_bf16("cuda" if torch.cuda.is_available() else "cpu"),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        scale_learning_rate=1e-4,
        hidden_distillation=1.0,
        **by_length,
    )
    job, training = parser.parse_args_into_dataclasses(arguments)
    return job, training


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the job; returns the rows."""
    job, training = parse(arguments)
    work = Job(job, training)
    set_seed(training.seed)
    teacher, made = work.float_classifier()
    teacher.eval()
    said = work.predict(teacher)
    print(f"float accuracy: {100 * work.accuracy(said):.2f} on {len(said)} texts", flush=True)
    rows = []
    for weights, activations in product(job.weight_levels, job.activation_levels):
        row = work.run(teacher, said, weights, activations)
        row["seconds"]["float"] = made["seconds"]
        rows.append(row)
        if job.results:
            add_row(Path(job.results), row, work.asked(weights, activations))
        print(summary(rows), flush=True)
    return rows


if __name__ == "__main__":
    main()
