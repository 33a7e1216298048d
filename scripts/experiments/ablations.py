"""Settings of the method, one changed at a time: the evidence for the defaults of ``MaQDConfig``.

    python -m scripts.experiments.ablations --data-dir data
    python -m scripts.experiments.ablations --data-dir data --rows "surrogate*" --seeds 0 1 2

Every row quantizes stories260K to few levels of weights and inputs, calibrates it, distils it from
its float self on the same number of tokens, and differs from the first row in one setting. The loss
is that of held-out stories, in nats a token, before and after the training. Results go to a JSON
file after every run, and runs found there are not repeated. ``data`` holds ``models/stories260K``,
``tinystories/`` and ``wiki-sample/``.

The "trust mask" of QuEST (arXiv:2502.05003), which lets a gradient through where rounding moved the
value by at most half a quantizer's step, is no row of its own: on a uniform grid that is ``clip``.
``scripts/bench/quality_task.py`` has rows for the same settings on a larger language model.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    default_data_collator,
    set_seed,
)

from maqd_hf import MaQDConfig, quantize_model
from maqd_hf.calibration import calibrate
from maqd_hf.data.self_written import GENERATED, generated_blocks
from maqd_hf.data.text import load_text, tokenize_blocks
from maqd_hf.functional import SURROGATES
from maqd_hf.training.trainer import MaQDTrainer, MaQDTrainingArguments
from scripts.bench.quality_rules import RoundLatents
from scripts.bench.report.quality import ablations
from scripts.experiments.lbn_pretrained import token_loss

BLOCK = 256
STORIES, WIKIPEDIA = "tinystories", "wiki-sample"
GROUPS: dict[str, Any] = {
    "group_size": 32,
    "overrides": {"*.down_proj": {"group_size": 86}},  # it has 172 inputs
}


@dataclass(frozen=True)
class Row:
    """One row: settings that differ from the first row's.

    They are those of ``MaQDConfig``, of ``calibrate`` and of the training, the text of the latter
    two, and whether latents are rounded after every optimizer step.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    text: str = STORIES
    bfloat16_latents: bool = False


ROWS = [
    Row("as it is"),
    *(Row(f"surrogate {name}", {"surrogate": name}) for name in SURROGATES if name != "clip"),
    Row("no offset", {"weight_offset": False}),
    Row("groups of 32", GROUPS),
    Row("scales fixed", training={"scale_learning_rate": 0.0}),
    Row("scales at the latents' rate", training={"scale_learning_rate": 1e-3}),
    Row("a step a token", {"activation_scaling": "token"}),
    Row("inputs not rotated", {"rotation": None}),
    Row("first tokens like others", {"first_token": "shared"}),
    Row("channels not smoothed", calibration={"smoothing": False}),
    Row("no GPTQ", calibration={"gptq_weights": False, "smoothing": False}),
    Row("latents in bfloat16", bfloat16_latents=True),
    Row("text: Wikipedia", text=WIKIPEDIA),
    Row("text: the model's own", text=GENERATED),
]


@dataclass
class Arguments:
    """Command line."""

    data_dir: Path = field(metadata={"help": "Folder of models and text, see above."})
    results: Path = field(
        default=Path("results/ablations.json"),
        metadata={"help": "JSON; runs it already holds are not repeated."},
    )
    rows: list[str] = field(default_factory=lambda: ["*"], metadata={"help": "Glob patterns."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    weight_levels: int = 4
    activation_levels: int = 15
    steps: int = field(default=48, metadata={"help": "Optimizer steps of 8 x 256 tokens each."})
    learning_rate: float = 1e-3


class Task:
    """The float model, its texts in blocks to train on, and held-out stories."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        folder = arguments.data_dir / "models" / "stories260K"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        blocks = self._blocks(STORIES)
        self.held_out = blocks[-64:]
        self.texts = {STORIES: blocks[:-64]}

    def _blocks(self, text: str) -> Tensor:
        if text == GENERATED:
            wanted = 8 * BLOCK * self.arguments.steps
            found = generated_blocks(self.teacher, wanted, BLOCK)
        else:
            rows = load_text(str(self.arguments.data_dir / text))
            found = tokenize_blocks(rows, self.tokenizer, BLOCK, max_tokens=2_000_000)
        return torch.tensor(found["input_ids"][:])

    def blocks(self, text: str) -> Tensor:
        """Blocks (samples, tokens) to calibrate and train on."""
        if text not in self.texts:
            self.texts[text] = self._blocks(text)
        return self.texts[text]


def train(model: PreTrainedModel, row: Row, task: Task, blocks: Tensor, seed: int) -> None:
    """Train ``model`` on the float model's predictions over ``blocks`` (samples, tokens)."""
    with tempfile.TemporaryDirectory() as folder:
        training: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": task.arguments.steps,
            "per_device_train_batch_size": 8,
            "learning_rate": task.arguments.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "adam_beta2": 0.95,
            "quantizer_logging_steps": 0,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": not torch.cuda.is_available(),
            "dataloader_pin_memory": False,
            "seed": seed,
            **row.training,
        }
        MaQDTrainer(
            model,
            MaQDTrainingArguments(**training),
            default_data_collator,
            Dataset.from_dict({"input_ids": blocks, "labels": blocks}).with_format("torch"),
            teacher=task.teacher,
            callbacks=[RoundLatents()] if row.bfloat16_latents else None,
        ).train()


def run_row(row: Row, task: Task, seed: int) -> dict[str, Any]:
    """Quantize, calibrate and train one row; its losses before and after training, in nats."""
    arguments, began = task.arguments, time.perf_counter()
    set_seed(seed)
    settings: dict[str, Any] = {
        "weight_levels": arguments.weight_levels,
        "activation_levels": arguments.activation_levels,
        "layer_batch_norm": False,
        **row.config,
    }
    model = copy.deepcopy(task.teacher)
    compensated = row.calibration.get("gptq_weights", True)
    quantize_model(model, MaQDConfig(**settings), start="range" if compensated else "search")
    blocks = task.blocks(row.text)
    blocks = blocks[torch.randperm(len(blocks))]
    calibrate(model, blocks[:32], progress=False, **row.calibration)
    found = {"start": token_loss(model, task.held_out)}
    train(model, row, task, blocks, seed)
    found["trained"] = token_loss(model, task.held_out)
    return {**found, "seconds": round(time.perf_counter() - began)}


def main(arguments: Arguments) -> list[dict[str, Any]]:
    """Run what the results file does not hold yet, write it after every run, print the table."""
    path = arguments.results
    runs: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    task = Task(arguments)
    names = ("weight_levels", "activation_levels", "steps", "learning_rate")
    shared = {name: getattr(arguments, name) for name in names}
    base = token_loss(task.teacher, task.held_out)
    rows = [row for row in ROWS if any(fnmatchcase(row.name, p) for p in arguments.rows)]
    for seed in arguments.seeds:
        for row in rows:
            key = {**asdict(row), **shared, "seed": seed}
            if any(key.items() <= run.items() for run in runs):
                continue
            runs.append({**key, "float": base, **run_row(row, task, seed)})
            path.write_text(json.dumps(runs, indent=1) + "\n", "utf-8")
            print(runs[-1], flush=True)
    print(ablations(runs))
    return runs


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    main(parsed)
