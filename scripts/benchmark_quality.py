"""Quality at equal bits: float, round-to-nearest, other packages, other rules and MaQD, one command.

    python scripts/benchmark_quality.py                          # embedded model and text
    python scripts/benchmark_quality.py --data-dir data --tokens 65536
    python scripts/benchmark_quality.py --data-dir data --rows "MaQD*" "HQQ 4 bit*"
    python scripts/benchmark_quality.py --data-dir data --table rules

Every row of table ``llm`` starts from the same float model, keeps embedding and output head in
float, and is measured on the same windows of two texts; what is calibrated or trained sees the same
blocks of the same text, the same tokens in the same order. Trained rows are distilled from the float
model by one and the same loop, MaQD, other rules (`quality_rules`) and torchao's QAT alike. Peers
(`quality_peers`) run through their own packages, ``pip install maqd_hf[bench]``; one that is not
installed, or fails, is named in the file with its reason. Their weights are then multiplied as a
float matrix: this measures quality, ``benchmark_speed.py`` speed.

Table ``rules`` puts MaQD beside the other rules on a small model, three seeds: each rule has the best
of its learning rates, found on the first seed. It needs ``--data-dir``.

Results go to a JSON file after every run, and runs found there are not repeated. ``--data-dir``
holds ``wikitext-2/``, ``wiki-sample/``, ``imdb/`` (llm), ``tinystories/`` and
``models/stories260K`` (rules); without it the embedded articles are used for training (nine tenths)
and measuring (the rest).
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

# Spinning threads slow a busy machine down tenfold; read by OpenMP when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from datasets import Dataset, concatenate_datasets
from quality_peers import PEERS, finish_qat, quantize_peer
from quality_rules import RULES, apply_rule
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    default_data_collator,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from maqd_hf import MaQDConfig, model_size, pack_model, quantize_model
from maqd_hf.calibration import calibrate
from maqd_hf.data import EMBEDDED, load_text, spread_samples, tokenize_blocks
from maqd_hf.embedded import SMOLLM2, resolve_model
from maqd_hf.nn.precision import fast_bf16
from maqd_hf.perplexity import text_perplexity
from maqd_hf.saving import save_model
from maqd_hf.trainer import MaQDTrainer, MaQDTrainingArguments
from maqd_hf.versions import package_versions

# ---------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One way to quantise.

    Args:
        method: "float", "MaQD", a rule of ``quality_rules`` or a peer of ``quality_peers``.
        levels: of the weights.
        group: inputs that share a scale; None: one scale a row.
        activations: levels of the inputs, None: float.
        scaling: of the inputs, "token" or "static".
        start: MaQD only: "range" (round to nearest, nothing clipped), "search", "gptq".
        learning_rates: of the distillation, the best one counts; none: not trained.
    """

    name: str
    method: str
    levels: int | None = None
    group: int | None = 64
    activations: int | None = None
    scaling: Literal["token", "static"] = "token"
    start: Literal["range", "search", "gptq"] = "gptq"
    learning_rates: tuple[float, ...] = ()

    @property
    def trained(self) -> bool:
        return bool(self.learning_rates)


def _llm_rows() -> list[Row]:
    rows = [Row("float", "float")]
    for levels in (16, 8, 4, 3):
        rows.append(Row(f"round to nearest M={levels} g64", "MaQD", levels, 64, 255, start="range"))
        rows.append(Row(f"MaQD start M={levels} g64", "MaQD", levels, 64, 255))
    rates = {16: 1e-4, 8: 2e-4, 4: 5e-4, 3: 5e-4}
    for levels in (4, 16, 8, 3):
        rows.append(
            Row(f"MaQD M={levels} g64", "MaQD", levels, 64, 255, learning_rates=(rates[levels],))
        )
    rows += [
        Row("MaQD M=16 a row, static", "MaQD", 16, None, 255, "static", learning_rates=(1e-4,)),
        Row("MaQD M=16 g64, 4-bit inputs", "MaQD", 16, 64, 15, learning_rates=(1e-4,)),
        Row("SEQ M=4 a row", "SEQ", 4, None, 255, learning_rates=(5e-4,)),
        Row("LSQ M=4 a row", "LSQ", 4, None, 255, learning_rates=(5e-4,)),
        Row("BitNet M=3", "BitNet", 3, None, 255, learning_rates=(5e-4,)),
    ]
    for peer, widths in PEERS.items():
        for bits in widths:
            rates_of = (rates[2**bits],) if "QAT" in peer else ()
            inputs = 255 if "8-bit inputs" in peer or "QAT" in peer else None
            rows.append(
                Row(f"{peer} {bits} bit", peer, 2**bits, 64, inputs, learning_rates=rates_of)
            )
    return rows


def _rule_rows() -> list[Row]:
    rates = (3e-4, 1e-3, 3e-3)
    wanted = {16: ["LSQ"], 4: ["LSQ", "SEQ"], 3: ["LSQ", "SEQ", "BitNet"]}
    rows = [Row("float", "float")]
    for levels, others in wanted.items():
        rows += [
            Row(f"{rule} M={levels}", rule, levels, None, 255, learning_rates=rates)
            for rule in others
        ]
        for start in ("search", "gptq"):
            rows.append(
                Row(f"MaQD M={levels}, {start}", "MaQD", levels, None, 255, "token", start, rates)  # type: ignore[arg-type]
            )
    return rows


TABLES = {"llm": _llm_rows(), "rules": _rule_rows()}


@dataclass
class Arguments:
    model: str = field(default=EMBEDDED, metadata={"help": "Id, folder or 'embedded' (SmolLM2)."})
    data_dir: Path | None = field(default=None, metadata={"help": "See above."})
    results: Path = field(
        default=Path("results/quality.json"),
        metadata={"help": "JSON; runs it already holds are not repeated."},
    )
    table: list[str] = field(default_factory=lambda: ["llm"], metadata={"help": "llm, rules."})
    rows: list[str] = field(
        default_factory=lambda: ["*"],
        metadata={"help": "Glob patterns of row names, run in the order of the patterns."},
    )
    tokens: int = field(default=65_536, metadata={"help": "Training tokens of a row."})
    rule_tokens: int = field(default=204_800, metadata={"help": "The same, table rules."})
    block_size: int = field(default=256, metadata={"help": "Tokens of a training sample."})
    batch_size: int = field(default=4, metadata={"help": "Samples a step."})
    samples: int = field(default=32, metadata={"help": "Blocks for calibration."})
    window: int = field(default=512, metadata={"help": "Tokens of an evaluation window."})
    windows: int = field(default=24, metadata={"help": "Windows of each text."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Table rules."})
    models: Path | None = field(default=None, metadata={"help": "Keep trained models here."})


# ---------------------------------------------------------------------------------------- task


@dataclass
class Text:
    """Rows of a text to measure on; ``join`` as in ``text_perplexity``."""

    name: str
    rows: list[str]
    join: str | None = "\n\n"


class Task:
    """A float model, blocks of tokens to calibrate and train on, and texts to measure on."""

    def __init__(self, table: str, args: Arguments) -> None:
        self.table, self.args, self.data = table, args, args.data_dir
        self.small = table == "rules"
        self.tokens = args.rule_tokens if self.small else args.tokens
        self.seeds = args.seeds if self.small else [0]
        if self.small:
            assert self.data is not None
            self.name = "stories260K"
            folder = str(self.data / "models" / self.name)
        else:
            self.name = SMOLLM2 if args.model == EMBEDDED else Path(args.model).name
            folder = resolve_model(SMOLLM2 if args.model == EMBEDDED else args.model)
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.train, self.texts = self._texts()
        parts = [tokenize_blocks(text, self.tokenizer, args.block_size) for text in self.train]
        # As much of each, or all of it where less is wanted than there is.
        size = min(map(len, parts))
        parts = [part.shuffle(seed=0).select(range(size)) for part in parts]
        self.blocks: Dataset = concatenate_datasets(parts).shuffle(seed=0)
        self.said: dict[bytes, Tensor] = {}
        self.started: tuple[Any, PreTrainedModel] | None = None

    def _texts(self) -> tuple[list[Dataset], list[Text]]:
        if self.small:
            assert self.data is not None
            stories = load_text(str(self.data / "tinystories"))
            held_out = stories.select(range(len(stories) - 200, len(stories)))
            return [stories.select(range(len(stories) - 200))], [
                Text("tinystories", held_out["text"], None)
            ]
        if self.data is None:
            return [load_text(EMBEDDED)], [
                Text("embedded", load_text(EMBEDDED, split="test")["text"])
            ]
        wiki = self.data / "wikitext-2"
        imdb = load_text(str(self.data / "imdb" / "train.parquet")).shuffle(seed=0)
        return [
            load_text(str(wiki / "wikitext-2-tokens-validation.parquet"), join=""),
            load_text(str(self.data / "wiki-sample" / "enwiki-2016-105-articles.parquet"), column="text"),
        ], [
            Text("wikitext", load_text(str(wiki / "wikitext-2-raw-test.parquet"))["text"], ""),
            Text("imdb", imdb.select(range(min(200, len(imdb))))["text"]),
        ]

    def calibration_ids(self) -> Tensor:
        """(samples, tokens) ids."""
        return spread_samples(self.blocks, self.args.samples)

    def measure(self, model: PreTrainedModel) -> dict[str, dict[str, Any]]:
        """Sum of losses, tokens and perplexity of each text."""
        found = {}
        for text in self.texts:
            result = text_perplexity(
                model,
                self.tokenizer,
                text.rows,
                self.args.window,
                join=text.join,
                batch_size=4,
                max_windows=self.args.windows if text.join is not None else None,
            )
            found[text.name] = {
                "perplexity": result.perplexity,
                "nats": result.nll_sum / result.tokens,
                "tokens": result.tokens,
                "protocol": result.protocol,
            }
        return found

    def key(self, row: Row, seed: int, learning_rate: float | None) -> dict[str, Any]:
        """What makes two runs the same run."""
        settings = asdict(row)
        del settings["learning_rates"]
        args = self.args
        key: dict[str, Any] = {"table": self.table, "model": self.name, **settings}
        key["data"] = "embedded" if self.data is None else self.data.name
        key |= {"window": args.window, "windows": args.windows}
        if row.method != "float":
            key |= {"block_size": args.block_size, "samples": args.samples}
        if learning_rate is not None:
            key |= {"tokens": self.tokens, "batch_size": args.batch_size}
            key |= {"learning_rate": learning_rate, "seed": seed}
        return key


@contextmanager
def remembering(teacher: PreTrainedModel, said: dict[bytes, Tensor]) -> Iterator[None]:
    """Keep what the base model says of a sample: every row trains on the same ones."""
    forward = teacher.base_model.forward

    def remembered(input_ids: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        keys = [row.numpy(force=True).tobytes() for row in input_ids]
        if any(key not in said for key in keys):
            said.update(zip(keys, forward(input_ids=input_ids, **kwargs)[0], strict=True))
        return BaseModelOutputWithPast(last_hidden_state=torch.stack([said[k] for k in keys]))

    teacher.base_model.forward = remembered  # type: ignore[method-assign]
    try:
        yield
    finally:
        del teacher.base_model.forward


# ------------------------------------------------------------------------------------ one row


def start(row: Row, task: Task) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model before training, and what is known of it; a calibrated one is kept."""
    if row.method == "MaQD":
        config = {
            "weight_levels": row.levels,
            "group_size": row.group,
            "activation_levels": row.activations,
            "activation_scaling": row.scaling,
            "layer_batch_norm": False,
        }
        key = (config, row.start)
        if task.started is None or task.started[0] != key:
            model = copy.deepcopy(task.teacher)
            quantize_model(
                model, MaQDConfig(**config), start="search" if row.start == "search" else "range"
            )
            if row.start == "gptq" or row.scaling == "static":
                calibrate(model, task.calibration_ids(), gptq_weights=row.start == "gptq")
            task.started = (key, model)
        model = copy.deepcopy(task.started[1])
        return model, {"bits_per_weight": model_size(model).bits_per_quantized_weight}
    model = copy.deepcopy(task.teacher)
    if row.method == "float":
        return model, {"bits_per_weight": 32.0}
    assert row.levels is not None
    if row.method in RULES:
        apply_rule(model, row.method, row.levels, row.group)
        scales = 0 if row.method == "BitNet" else 32 / (row.group or model.config.hidden_size)
        return model, {"bits_per_weight": math.log2(row.levels) + scales}
    assert row.group is not None
    bits = row.levels.bit_length() - 1
    stored = quantize_peer(
        row.method, model, bits, row.group, task.calibration_ids(), task.folder
    )
    return model, {"bits_per_weight": stored}


def distil(model: PreTrainedModel, task: Task, rate: float, seed: int) -> dict[str, Any]:
    """Train ``model`` on the float model's predictions; the loss of every step."""
    args = task.args
    for kept in (model.get_input_embeddings(), model.get_output_embeddings()):
        kept.requires_grad_(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder, remembering(task.teacher, task.said):
        training = MaQDTrainingArguments(
            output_dir=folder,
            max_steps=max(1, task.tokens // (args.batch_size * args.block_size)),
            per_device_train_batch_size=args.batch_size,
            learning_rate=rate,
            scale_learning_rate=rate if task.small else 1e-4,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            adam_beta2=0.95,
            logging_steps=1,
            quantizer_logging_steps=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=task.small,
            bf16=not task.small and fast_bf16(device),
            use_cpu=device == "cpu",
            dataloader_pin_memory=False,
            seed=seed,
            data_seed=seed,
        )
        trainer = MaQDTrainer(
            model=model,
            args=training,
            teacher=task.teacher,
            train_dataset=task.blocks,
            data_collator=default_data_collator,
        )
        trainer.train()
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.eval()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"loss": losses, "bf16": training.bf16}


def run_row(row: Row, task: Task, seed: int, rate: float | None) -> dict[str, Any]:
    """Quantise, train if wanted, measure."""
    set_seed(seed)
    began = time.perf_counter()
    model, found = start(row, task)
    if rate is not None:
        found |= distil(model, task, rate, seed)
    if "QAT" in row.method:
        model = finish_qat(model)
    found["seconds"] = round(time.perf_counter() - began)
    found["texts"] = task.measure(model)
    if rate is not None and task.args.models and row.method == "MaQD" and not task.small:
        pack_model(model)
        save_model(model, task.args.models / row.name.replace(" ", "_"), task.tokenizer)
    return found


# ------------------------------------------------------------------------------------ all rows


class Results:
    """The file: runs, peers that did not run, versions; written after every change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        stored = json.loads(path.read_text("utf-8")) if path.exists() else {}
        self.runs: list[dict[str, Any]] = stored.get("runs", [])
        self.missing: dict[str, str] = stored.get("missing", {})

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        return next((run for run in self.runs if key.items() <= run.items()), None)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"versions": package_versions(), "missing": self.missing, "runs": self.runs}
        text = json.dumps(content, indent=1)
        self.path.write_text(_flat_lists(text) + "\n", "utf-8")


def _flat_lists(text: str) -> str:
    """JSON with lists of numbers on one line: a loss curve has hundreds of values."""
    return re.sub(r"\[[\d\s.,eE+-]+\]", lambda found: "".join(found[0].split()), text)


def nats(run: dict[str, Any]) -> float:
    """Mean over the texts."""
    return sum(text["nats"] for text in run["texts"].values()) / len(run["texts"])


def run_all_of(row: Row, task: Task, results: Results) -> None:
    """Every learning rate on the first seed, the best of them on the others."""

    def once(seed: int, rate: float | None) -> dict[str, Any]:
        key = task.key(row, seed, rate)
        run = results.find(key)
        if run is None:
            run = {**key, **run_row(row, task, seed, rate)}
            results.runs.append(run)
            results.missing.pop(row.name, None)
            results.write()
            values = ", ".join(f"{t} {v['perplexity']:.3f}" for t, v in run["texts"].items())
            print(f"{row.name} (seed {seed}, rate {rate}): {values}", flush=True)
        return run

    if not row.trained:
        once(task.seeds[0], None)
        return
    first = [once(task.seeds[0], rate) for rate in row.learning_rates]
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
        for row in dict.fromkeys(chosen):
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
