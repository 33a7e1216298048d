"""The worth of block-wise reconstruction: the experiments behind `maqd_hf.calibration.blockwise`.

    python -m scripts.experiments.blockwise --weight_levels 4      # embedded model and text
    python -m scripts.experiments.blockwise --model FOLDER --text FOLDER --sample_tokens 256 \
        --samples 64 --tokens 131072 --weight_levels 16 4          # any causal LM and any text

Every row quantizes the same float model, spends the same number of training tokens (a token counts
once for every time it is trained on; block-wise, once for all blocks) and is measured after each
stage: the float model, the start values (GPTQ), block-wise reconstruction, then distillation end to
end. Rows differ in the share of the tokens that the blocks get, and in one setting. Results go to a
JSON file after every run, and runs found there are not repeated.
"""

from __future__ import annotations

import copy
import json
import math
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
from maqd_hf.calibration.blockwise import reconstruct_blocks
from maqd_hf.data.bundled import SMOLLM2, resolve_model
from maqd_hf.data.text import EMBEDDED, load_text, spread_samples, tokenize_blocks
from maqd_hf.evaluation.perplexity import text_perplexity, token_perplexity
from maqd_hf.nn.precision import fast_bf16
from maqd_hf.training.trainer import MaQDTrainer, MaQDTrainingArguments


@dataclass(frozen=True)
class Row:
    """One way to spend the training tokens.

    Args:
        share: share of the tokens for block-wise reconstruction; the rest goes end to end.
        blockwise: settings of ``reconstruct_blocks``.
        config: settings of ``MaQDConfig``.
        gptq: error compensation before training, or nearest codes on the searched grid.
    """

    name: str
    share: float = 1.0
    blockwise: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    gptq: bool = True


ROWS = [
    Row("end to end alone", share=0.0),
    Row("block-wise alone"),
    Row("half block-wise, then end to end", share=0.5),
    Row("a quarter block-wise, then end to end", share=0.25),
    Row("without GPTQ", gptq=False),
    Row("target: local", blockwise={"correction": 0.0}),
    Row("target: float", blockwise={"correction": 1.0}),
    Row("error relative to each token", blockwise={"relative_tokens": True}),
    Row("first tokens count", blockwise={"skip_first": False}),
    Row("scales fixed", blockwise={"scale_learning_rate": 0.0}),
    Row("scales 10 x faster", blockwise={"scale_learning_rate": 1e-3}),
    Row("latents fixed", blockwise={"learning_rate": 0.0}),
    Row("latents at 0.003", blockwise={"learning_rate": 0.003}),
    Row("latents at 0.03", blockwise={"learning_rate": 0.03}),
    Row("latents at 0.1", blockwise={"learning_rate": 0.1}),
    Row("no gradient clip", blockwise={"gradient_clip": 1e9}),
    Row("4 samples a step", blockwise={"batch_size": 4}),
    Row("float32 products", blockwise={"autocast": False}),
    Row("no offset", config={"weight_offset": False}),
    Row("one scale a row", config={"group_size": None}),
]


@dataclass
class Arguments:
    """Command line."""

    model: str = field(default=EMBEDDED, metadata={"help": "Id, folder or 'embedded' (SmolLM2)."})
    text: str = field(default=EMBEDDED, metadata={"help": "'embedded', a file, a folder, an id."})
    eval_text: str | None = field(
        default=None, metadata={"help": "Default: the last 64 blocks of --text, not trained on."}
    )
    join: str | None = field(
        default=None, metadata={"help": "Put between rows that are lines of one text."}
    )
    output: Path = field(
        default=Path("results/blockwise.json"),
        metadata={"help": "JSON; runs it already holds are not repeated."},
    )
    rows: list[str] = field(
        default_factory=lambda: ["*"], metadata={"help": "Glob patterns of row names."}
    )
    weight_levels: list[int] = field(default_factory=lambda: [4])
    group_size: int = field(default=64, metadata={"help": "0: one scale per row."})
    activation_levels: int | None = field(default=255, metadata={"help": "Per token; 255: 8 bit."})
    samples: int = field(default=64, metadata={"help": "To calibrate and train blocks on."})
    sample_tokens: int = 512
    tokens: int = field(default=131_072, metadata={"help": "Training tokens of a row."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Rate end to end."})
    batch_size: int = field(default=4, metadata={"help": "Samples an optimizer step, end to end."})
    window: int = field(default=512, metadata={"help": "Tokens of a window of --eval_text."})
    eval_windows: int = 24
    seed: int = 0


class Task:
    """A float model, its text in blocks of tokens, and how a model is measured."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        folder = resolve_model(SMOLLM2 if arguments.model == EMBEDDED else arguments.model)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        text = load_text(arguments.text, join=arguments.join)
        self.blocks = tokenize_blocks(text, self.tokenizer, arguments.sample_tokens)
        self.starts: dict[str, PreTrainedModel] = {}
        self.held_out: Tensor | None = None
        self.eval_rows: list[str] = []
        if arguments.eval_text is not None:
            self.eval_rows = load_text(arguments.eval_text)["text"]
        else:
            kept = range(len(self.blocks) - 64, len(self.blocks))
            self.held_out = torch.tensor(self.blocks[kept]["input_ids"])
            self.blocks = self.blocks.select(range(len(self.blocks) - 64))

    def calibration_ids(self) -> Tensor:
        """(samples, tokens), spread evenly over the text."""
        return spread_samples(self.blocks, self.arguments.samples)

    def nats(self, model: PreTrainedModel) -> float:
        """The mean loss per token of the evaluation text, in nats."""
        windows = self.arguments.eval_windows
        if self.held_out is not None:
            row, size = self.held_out.flatten(), self.held_out.shape[1]
            result = token_perplexity(model, row, size, batch_size=4)
        else:
            join = "\n\n" if self.arguments.join is None else self.arguments.join
            size = self.arguments.window
            result = text_perplexity(
                model, self.tokenizer, self.eval_rows, size, join=join, max_windows=windows
            )
        return result.nll_sum / result.tokens


def start(row: Row, task: Task, levels: int) -> PreTrainedModel:
    """The quantized model with its start values; the last one is kept for the next row."""
    arguments = task.arguments
    config: dict[str, Any] = {
        "weight_levels": levels,
        "group_size": arguments.group_size or None,
        "activation_levels": arguments.activation_levels,
        "activation_scaling": "token",
        "layer_batch_norm": False,
        "rotation": None,
        **row.config,
    }
    key = json.dumps([config, row.gptq])
    if key not in task.starts:
        model = copy.deepcopy(task.teacher)
        quantize_model(model, MaQDConfig(**config), start="range" if row.gptq else "search")
        calibrate(model, task.calibration_ids(), gptq_weights=row.gptq, smoothing=False)
        task.starts = {key: model}
    return copy.deepcopy(task.starts[key])


def run_row(row: Row, task: Task, levels: int) -> dict[str, Any]:
    """Quantize and train one row.

    Returns losses in nats and seconds of every stage, and the errors of the blocks.
    """
    arguments = task.arguments
    set_seed(arguments.seed)
    found: dict[str, Any] = {"seconds": {}}
    watch = time.perf_counter()

    def record(stage: str) -> None:
        nonlocal watch
        found["seconds"][stage] = round(time.perf_counter() - watch)
        found[stage] = task.nats(model)
        print(f"  {row.name}, {levels} levels, {stage}: {math.exp(found[stage]):.2f}", flush=True)
        watch = time.perf_counter()

    ids = task.calibration_ids()
    model = start(row, task, levels)
    record("start")
    epochs = round(row.share * arguments.tokens / ids.numel())
    if epochs:
        report = reconstruct_blocks(model, task.teacher, ids, epochs=epochs, **row.blockwise)
        print(report)
        found["blocks"] = report.to_dict()["blocks"]
        record("block-wise")
    left = arguments.tokens - epochs * ids.numel()
    if left >= arguments.batch_size * arguments.sample_tokens:
        distill(model, task, left)
        record("end to end")
    return found


def distill(model: PreTrainedModel, task: Task, tokens: int) -> None:
    """Train the whole model on the float model's predictions."""
    arguments = task.arguments
    blocks: Dataset = task.blocks.shuffle(seed=arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        training = MaQDTrainingArguments(
            output_dir=folder,
            max_steps=tokens // (arguments.batch_size * arguments.sample_tokens),
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            scale_learning_rate=1e-4,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            bf16=fast_bf16("cuda" if torch.cuda.is_available() else "cpu"),
            use_cpu=not torch.cuda.is_available(),
            seed=arguments.seed,
        )
        MaQDTrainer(
            model=model,
            args=training,
            teacher=task.teacher,
            train_dataset=blocks,
            data_collator=default_data_collator,
        ).train()
    model.eval()


def summarize(runs: list[dict[str, Any]]) -> str:
    """The runs as a table of perplexities."""
    stages = ("start", "block-wise", "end to end")
    lines = [f"{'':<40}{'levels':>7}{'float':>9}" + "".join(f"{stage:>12}" for stage in stages)]
    for run in runs:
        numbers = [f"{math.exp(run[s]):.2f}" if s in run else "" for s in stages]
        cells = "".join(f"{number:>12}" for number in numbers)
        head = f"{run['name']:<40}{run['levels']:>7}{math.exp(run['float']):>9.2f}"
        lines.append(head + cells)
    return "\n".join(lines)


def main(arguments: Arguments) -> list[dict[str, Any]]:
    """Run what the output file does not hold yet, write it after every run, print the table."""
    stored = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    runs: list[dict[str, Any]] = list(stored)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    task = Task(arguments)
    shared = asdict(arguments)
    for name in ("output", "rows", "weight_levels"):
        del shared[name]
    base = task.nats(task.teacher)
    for levels in arguments.weight_levels:
        for row in ROWS:
            if not any(fnmatchcase(row.name, pattern) for pattern in arguments.rows):
                continue
            key = {**asdict(row), "levels": levels, "arguments": shared}
            if any(key.items() <= run.items() for run in runs):
                continue
            runs.append({**key, "float": base, **run_row(row, task, levels)})
            arguments.output.write_text(json.dumps(runs, indent=1) + "\n")
    print(summarize(runs))
    return runs


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    main(parsed)
