"""The settings of the main job (``scripts/qat_llm.py``), and its command line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser

from ..calibration.static_norms import TOLERANCE
from ..config import MaQDConfig
from ..data.self_written import GENERATED
from ..data.text import EMBEDDED
from ..nn.precision import fast_bf16
from .arguments import MaQDTrainingArguments

WITHOUT_A_SAY = {
    "checkpoint_share", "ddp_timeout", "disable_tqdm", "log_level", "log_level_replica", "metrics",
    "output_dir", "overwrite", "report_to", "resume_from_checkpoint", "run_name", "save_steps",
    "save_strategy", "save_total_limit",
}  # fmt: skip
"""Settings that may change when a run goes on: the result does not depend on them."""


@dataclass
class JobArguments:
    """What to quantize, on which text, and how."""

    model: str = field(
        default="smollm2-135m-instruct", metadata={"help": "Hub id, folder or embedded name."}
    )
    dataset: str = field(
        default="embedded",
        metadata={
            "help": "Hub id, .txt, .parquet, .jsonl, 'embedded', or 'generated': the float model "
            "writes it."
        },
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out text; default: --dataset, or 'embedded'."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    text_column: str | None = field(default=None, metadata={"help": "Column that holds the text."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="validation", metadata={"help": "Held-out split."})
    weight_levels: int = field(default=16, metadata={"help": "Levels of a weight (16 = 4 bit)."})
    activation_levels: int | None = field(default=255, metadata={"help": "Levels of an input."})
    activation_scaling: Literal["static", "token", "group"] = field(
        default="token",
        metadata={"help": "One step per token, one per group of it, or one learned per layer."},
    )
    group_size: int | None = field(default=64, metadata={"help": "Inputs that share a scale."})
    embedding_levels: int | None = field(default=255, metadata={"help": "Embedding and head."})
    config: str | None = field(
        default=None, metadata={"help": "JSON file with a whole MaQDConfig; replaces the above."}
    )
    lbn_tolerance: float = field(
        default=TOLERANCE,
        metadata={"help": "Norms become static as long as the loss rises by at most this (nats)."},
    )
    calibration_samples: int = field(default=48, metadata={"help": "Calibration blocks."})
    block_size: int = field(default=256, metadata={"help": "Tokens of a training sample."})
    train_tokens: int = field(default=16_384, metadata={"help": "Used if no max_steps."})
    eval_window: int = field(default=512, metadata={"help": "Tokens of an evaluation window."})
    eval_windows: int = field(default=12, metadata={"help": "Windows to evaluate on."})
    prompt: str = field(default="The city was founded in", metadata={"help": "For the sample."})
    new_tokens: int = field(default=40, metadata={"help": "Tokens to generate as a sample."})
    metrics: str | None = field(
        default=None, metadata={"help": "Write metrics.json here as well, without any paths."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing run directory."})

    @property
    def held_out(self) -> str:
        """Where the text comes from that the models are measured on."""
        usual = EMBEDDED if self.dataset == GENERATED else self.dataset
        return self.eval_dataset or usual

    def maqd_config(self) -> MaQDConfig:
        """The quantization asked for."""
        if self.config is not None:
            return MaQDConfig.from_dict(json.loads(Path(self.config).read_text("utf-8")))
        return MaQDConfig(
            weight_levels=self.weight_levels,
            activation_levels=self.activation_levels,
            activation_scaling=self.activation_scaling,
            group_size=self.group_size,
            embedding_levels=self.embedding_levels,
        )


def parse_job(arguments: list[str] | None = None) -> tuple[JobArguments, MaQDTrainingArguments]:
    """Command line to arguments; the defaults are those of the embedded job."""
    parser = HfArgumentParser([JobArguments, MaQDTrainingArguments])  # type: ignore[list-item]
    parser.set_defaults(
        output_dir="runs/smollm2-135m-4bit",
        lr_scheduler_type="cosine",
        warmup_steps=2,
        per_device_train_batch_size=1,
        logging_steps=1,
        save_strategy="no",
        save_total_limit=1,
        checkpoint_share=0.02,
        report_to="none",
        max_grad_norm=1.0,
        bf16=fast_bf16("cuda" if torch.cuda.is_available() else "cpu"),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        adam_beta2=0.95,
        ddp_timeout=86_400,  # of several processes all but the first wait for the start values
    )
    job, training = parser.parse_args_into_dataclasses(arguments)
    return job, training


def settings_of(job: JobArguments, training: MaQDTrainingArguments) -> dict[str, Any]:
    """All settings of a run, as JSON holds them."""
    return {
        "job": asdict(job),
        "quantization": job.maqd_config().to_dict(),
        "training": training.to_sanitized_dict(),
        "processes": training.world_size,
    }


def asked_checkpoint(training: MaQDTrainingArguments) -> str | bool | None:
    """``--resume_from_checkpoint`` as a path, as True (there must be one), or None."""
    word = str(training.resume_from_checkpoint)
    if word.lower() in ("none", "false", "0", "no"):
        return None
    return True if word.lower() in ("true", "1", "yes") else word
