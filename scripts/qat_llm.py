"""Quantise, train, pack, reload and evaluate a small language model: the main job, one command.

Without arguments: SmolLM2-135M-Instruct and 101 Wikipedia articles, both from ordinary packages, to
4-bit weights, 8-bit activations and Layer-Batch Normalization where the budget allows it. A token's
inputs have a step of their own: one learned step a layer (``--activation_scaling static``), which
leaves nothing to compute, starts and ends a perplexity of one higher.

How samples to calibrate on and tokens to train on share the time (float 33.0; start, end, seconds,
two cores): 16 and 20,480: 37.5, 36.5, 495; 32 and 10,240: 36.8, 36.2, 410; 80 and 10,240: 36.2,
36.0, 493; 48 and 16,384, the default: the best of them (README has its figures).

    python scripts/qat_llm.py
    python scripts/qat_llm.py --model someone/some-llm --dataset someone/some-text --weight_levels 4
    python scripts/qat_llm.py --metrics results/main_job.json
    torchrun --nproc_per_node 2 scripts/qat_llm.py    # several processes share the training

The run directory holds arguments.json, metrics.json, plot.png, README.md (the model card) and
model/ (the packed model), and generated/ if the model wrote the text itself. Ctrl-C while training
leaves a checkpoint; ``--resume_from_checkpoint true`` continues from the last one. With several
processes the first does all but the training, and the others wait. ``torchrun`` starts them;
``accelerate launch`` does on GPUs, but one alone on a CPU without MPI.
"""

from __future__ import annotations

if not __package__:  # run as a file: scripts/__init__.py has not done it
    import torch_environment  # noqa: F401  (before torch)

import argparse
import copy
import json
import math
import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
from datasets import Dataset, load_from_disk
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    default_data_collator,
)

from maqd_hf import MaQDConfig, model_size, pack_model, quantize_model
from maqd_hf.calibration import calibrate
from maqd_hf.calibration.static_norms import select_static_norms
from maqd_hf.checkpoint.saving import save_model
from maqd_hf.data.bundled import resolve_model
from maqd_hf.data.self_written import GENERATED, generated_blocks
from maqd_hf.data.text import EMBEDDED, load_text, tokenize_blocks
from maqd_hf.evaluation.model_card import write_card
from maqd_hf.evaluation.perplexity import PerplexityResult, text_perplexity
from maqd_hf.evaluation.versions import package_versions
from maqd_hf.nn.precision import fast_bf16
from maqd_hf.training.trainer import MaQDTrainer, MaQDTrainingArguments, last_complete_checkpoint

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_MOST_TOKENS = 2_000_000  # of a large dataset; tokenising more than a short run sees takes minutes


@dataclass
class JobArguments:
    """What to quantise, on which text, and how."""

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
        default=0.02,
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
        """The quantisation asked for."""
        if self.config is not None:
            return MaQDConfig.from_dict(json.loads(Path(self.config).read_text("utf-8")))
        return MaQDConfig(
            weight_levels=self.weight_levels,
            activation_levels=self.activation_levels,
            activation_scaling=self.activation_scaling,
            group_size=self.group_size,
            embedding_levels=self.embedding_levels,
        )


class Run:
    """The run directory and everything measured so far; metrics.json is always up to date."""

    def __init__(self, folder: Path, first: bool = True) -> None:
        self.folder, self.path, self.first = folder, folder / "metrics.json", first
        self.metrics = self.reread()
        self.began = time.perf_counter() - self.metrics.get("seconds", {}).get("total", 0.0)

    def reread(self) -> dict[str, Any]:
        """What metrics.json holds now; nothing, if there is none yet."""
        if not self.path.exists():
            return {}
        found: dict[str, Any] = json.loads(self.path.read_text("utf-8"))
        return found

    def record(self, **values: Any) -> None:
        """Add to metrics.json (written beside, then renamed, by the first of several processes)."""
        self.metrics.update(values)
        if not self.first:
            return
        self.metrics.setdefault("seconds", {})["total"] = round(time.perf_counter() - self.began, 1)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.metrics, indent=2) + "\n", "utf-8")
        beside.replace(self.path)

    @contextmanager
    def stage(self, title: str) -> Any:
        """Announce a stage and record its seconds."""
        if self.first:
            print(f"\n== {title}", flush=True)
        began = time.perf_counter()
        yield
        seconds = self.metrics.setdefault("seconds", {})
        seconds[title] = round(time.perf_counter() - began, 1)
        self.record()


class Job:
    """The stages of the main job, in order, over one run directory."""

    def __init__(self, job: JobArguments, training: MaQDTrainingArguments) -> None:
        self.job, self.training = job, training
        self.config = job.maqd_config()
        folder = Path(str(training.output_dir))
        self.checkpoint = _find_checkpoint(folder, training.resume_from_checkpoint)
        self.first = training.process_index == 0
        with training.main_process_first(local=False, desc="run directory"):
            if self.first:
                _prepare_folder(folder, job.overwrite, resuming=self.checkpoint is not None)
            self.run = Run(folder, self.first)
        if not self.first:
            return
        arguments = {
            "job": asdict(job),
            "quantization": self.config.to_dict(),
            "training": training.to_sanitized_dict(),
        }
        (folder / "arguments.json").write_text(json.dumps(arguments, indent=2) + "\n", "utf-8")

    def load(self) -> None:
        """Float model, tokenizer and text."""
        source = resolve_model(self.job.model)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        self.eval_text: list[str] = list(self.text(self.job.held_out, self.job.eval_split)["text"])
        steps, per_step = self.training.max_steps, self.tokens_per_step
        if steps <= 0:
            steps = self.training.max_steps = max(1, self.job.train_tokens // per_step)
        wanted = steps * per_step
        if self.job.dataset == GENERATED:
            self.blocks = self.written_by_model(wanted)
            return
        # Whole text, then shuffled: consecutive blocks are one article, and start values fitted to
        # one article are bad ones (perplexity 89 against 64 with plain GPTQ at 4 bit).
        with self.training.main_process_first(desc="text"):  # the others find it in the cache
            self.blocks = tokenize_blocks(
                self.text(self.job.dataset, self.job.train_split),
                self.tokenizer,
                self.job.block_size,
                max_tokens=max(_MOST_TOKENS, wanted),
            ).shuffle(seed=self.training.seed)

    def written_by_model(self, tokens: int) -> Dataset:
        """Samples that the first process lets the float model write, into the run directory."""
        folder, seed = self.run.folder / GENERATED, self.training.seed
        with self.training.main_process_first(local=False, desc="generated text"):
            if self.first:
                with all_threads(self.training):
                    written = generated_blocks(self.teacher, tokens, self.job.block_size, seed=seed)
                written.save_to_disk(folder)
        return load_from_disk(folder)

    def text(self, source: str, split: str) -> Dataset:
        """Rows of text of a split of ``source``."""
        given = source == self.job.dataset  # column and configuration are its
        return load_text(
            source,
            split=split,
            column=self.job.text_column if given else None,
            config_name=self.job.dataset_config_name if given else None,
        )

    @property
    def tokens_per_step(self) -> int:
        training = self.training
        samples = training.train_batch_size * training.gradient_accumulation_steps
        return self.job.block_size * samples * training.world_size

    def perplexity(self, model: nn.Module, stage: str) -> PerplexityResult:
        """Measure ``model`` on the held-out text and record it as ``stage``."""
        result = text_perplexity(
            model,
            self.tokenizer,
            self.eval_text,
            self.job.eval_window,
            max_windows=self.job.eval_windows,
            progress=True,
        )
        found = self.run.metrics.setdefault("perplexity", {})
        found[stage] = result.perplexity
        self.run.record(protocol=result.protocol)
        print(f"   perplexity, {stage}: {result.perplexity:.2f}", flush=True)
        return result

    def first_samples(self, count: int) -> Tensor:
        """(samples, tokens) ids: the first ``count`` training samples, fewer if there are."""
        return torch.tensor(self.blocks[:count]["input_ids"])

    def begin(self) -> tuple[PreTrainedModel, list[str]]:
        """The model to train, and its static norms: from the last checkpoint, from its start values
        or, in all processes but the first, from what that one left in the run directory."""
        source = self.checkpoint or (None if self.first else self.handed_over)
        if source is not None:
            norms = list(self.run.reread().get("norms", {}).get("static", []))
            return AutoModelForCausalLM.from_pretrained(source), norms
        with self.run.stage("float model"):
            self.perplexity(self.teacher, "float")
        with self.run.stage("start values"):
            student = self.start()
            self.perplexity(student, "start")
        with self.run.stage("static norms"):
            norms = self.choose_norms(student)
        if self.training.world_size > 1:
            save_model(student, self.handed_over)
        return student, norms

    @property
    def handed_over(self) -> Path:
        """Where the first of several processes leaves the start values."""
        return self.run.folder / "start"

    def start(self) -> PreTrainedModel:
        """Convert and calibrate: the best model that needs no training."""
        student = copy.deepcopy(self.teacher)
        report = quantize_model(student, self.config, start="range")  # calibrate searches
        print(report)
        print(calibrate(student, self.first_samples(self.job.calibration_samples)))
        self.run.record(report=_card_report(report))
        return student

    def choose_norms(self, student: nn.Module) -> list[str]:
        """Which norms can be static within the tolerance; the others stay per token."""
        if not self.config.layer_batch_norm:
            return []
        chosen = select_static_norms(student, [self.first_samples(2)], self.job.lbn_tolerance)
        print(chosen)
        self.run.record(norms={**chosen.to_dict(), "static": chosen.static})
        return chosen.static

    def train(self, student: PreTrainedModel, static_norms: list[str]) -> MaQDTrainer:
        """Distil the float model into the quantised one."""
        self.training.lbn_norms = static_norms
        trainer = MaQDTrainer(
            model=student,
            args=self.training,
            teacher=self.teacher,
            train_dataset=self.blocks,
            processing_class=self.tokenizer,
            data_collator=default_data_collator,
        )
        began = time.perf_counter()
        trainer.train(resume_from_checkpoint=self.checkpoint)
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        self.run.record(
            training={
                "steps": trainer.state.global_step,
                "tokens": trainer.state.global_step * self.tokens_per_step,
                "learning_rate": self.training.learning_rate,
                "bf16": self.training.bf16,
                "seconds": round(time.perf_counter() - began, 1),
            },
            loss=[{"step": e["step"], "loss": e["loss"]} for e in history],
        )
        return trainer

    def pack(self, student: Any) -> Any:
        """Pack, save, forget, reload: what a user of the model will have."""
        report = pack_model(student)
        print(report)
        folder = self.run.folder / "model"
        save_model(student, folder, self.tokenizer)
        size = model_size(student)
        self.run.record(
            report=_card_report(report),
            bits_per_weight=size.bits_per_weight,
            packed_bytes=_file_bytes(folder),
            float_bytes=2 * sum(p.numel() for p in self.teacher.parameters()),
            size=asdict(size),
        )
        return AutoModelForCausalLM.from_pretrained(folder)

    def sample(self, model: Any) -> str:
        """Greedy continuation of the prompt."""
        inputs = self.tokenizer(self.job.prompt, return_tensors="pt")
        began = time.perf_counter()
        out = model.generate(**inputs, max_new_tokens=self.job.new_tokens, do_sample=False)
        seconds = time.perf_counter() - began
        text = str(self.tokenizer.decode(out[0], skip_special_tokens=True))
        self.run.record(sample=text, sample_tokens_per_second=self.job.new_tokens / seconds)
        return text

    def finish(self) -> None:
        """Card, plot and the closing table."""
        values = self.run.metrics["perplexity"]
        self.run.record(
            model_id=self.run.folder.name,
            base_model=self.job.model,
            command=_command(sys.argv[1:]),
            versions=package_versions(),
            evaluations=[
                {
                    "text": f"{self.job.held_out}, {self.job.eval_split}",
                    "metric": "perplexity",
                    "values": {"float": values["float"], "packed": values["reloaded"]},
                    "protocol": self.run.metrics["protocol"],
                }
            ],
        )
        plot(self.run.metrics, self.run.folder / "plot.png")
        write_card(self.run.folder)
        if self.job.metrics is not None:
            shutil.copyfile(self.run.path, self.job.metrics)
        print(summary(self.run.metrics, self.run.folder))


@contextmanager
def all_threads(training: MaQDTrainingArguments) -> Any:
    """Those of the processes that wait, too: each has been given its share of the processor."""
    threads = torch.get_num_threads()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this machine: the launcher's
    torch.set_num_threads(threads * here if training.use_cpu else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _command(words: list[str]) -> str:
    """The command line without the places it writes to, which mean nothing elsewhere."""
    places = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    places.add_argument("--output_dir")
    places.add_argument("--metrics")
    return " ".join(["python scripts/qat_llm.py", *places.parse_known_args(words)[1]])


def _find_checkpoint(folder: Path, resume: str | None) -> str | None:
    if resume is None or str(resume).lower() in ("false", "0", "no"):
        return None
    if str(resume).lower() not in ("true", "1", "yes"):
        return str(resume)
    found = last_complete_checkpoint(folder) if folder.is_dir() else None
    if found is None:
        raise SystemExit(f"{folder} holds no complete checkpoint to resume from")
    return found


def _prepare_folder(folder: Path, overwrite: bool, resuming: bool) -> None:
    if resuming:
        return
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise SystemExit(
                f"{folder} is not empty: choose another --output_dir, continue it with "
                "--resume_from_checkpoint true, or replace it with --overwrite"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def _file_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def _card_report(report: Any) -> dict[str, Any]:
    def by(word: str) -> list[str]:
        return [name for name, text in report.norms.items() if text.startswith(word)]

    return {
        "layers": report.linears,
        "embeddings": report.embeddings,
        "static norms": by("static"),
        "norms per token": by("per token"),
        "left in float": report.kept,
    }


def plot(metrics: dict[str, Any], path: Path) -> None:
    """Training loss, and perplexity from float to the reloaded packed model.

    The bars start below the least of them by as much as they differ, so that this can be seen.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    loss = metrics.get("loss", [])
    left.plot([e["step"] for e in loss], [e["loss"] for e in loss], color="tab:blue")
    left.set(title="distillation loss", xlabel="optimizer step", ylabel="KL to float, nats a token")
    left.grid(alpha=0.3)
    stages = metrics["perplexity"]
    bars = right.bar(list(stages), list(stages.values()), color="tab:blue", width=0.6)
    bars[0].set_color("tab:gray")
    right.bar_label(bars, fmt="%.2f")
    least, most = min(stages.values()), max(stages.values())
    spread = (most - least) or 1.0
    right.set(title="perplexity on held-out text (lower is better)")
    if math.isfinite(spread):
        right.set_ylim(max(0.0, least - spread), most + 0.2 * spread)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def summary(metrics: dict[str, Any], folder: Path) -> str:
    """The closing table: what was achieved against float."""
    float_ppl = metrics["perplexity"]["float"]
    rows = [
        (stage, f"{value:.2f}", f"{100 * (value / float_ppl - 1):+.1f} %")
        for stage, value in metrics["perplexity"].items()
    ]
    lines = ["", "stage".ljust(28) + "perplexity".rjust(12) + "to float".rjust(12)]
    lines += [name.ljust(28) + value.rjust(12) + change.rjust(12) for name, value, change in rows]
    static, token = metrics["report"]["static norms"], metrics["report"]["norms per token"]
    packed, full = metrics["packed_bytes"], metrics["float_bytes"]
    lines += [
        "",
        f"{metrics['bits_per_weight']:.2f} bits a weight over the whole model; "
        f"{packed / 2**20:.1f} MiB on disk, {full / 2**20:.1f} MiB in bfloat16 "
        f"({full / packed:.1f}x smaller)",
        f"{len(static)} norms static, {len(token)} per token"
        + (
            f" (KL to per-token norms before training {metrics['norms']['cost']:.3f} nats)"
            if "norms" in metrics
            else ""
        ),
        f"measured: {metrics['protocol']}",
        f"sample: {metrics['sample']!r}",
        f"{metrics['seconds']['total']:.0f} s in all; everything is in {folder}",
        f'load it: import maqd_hf; AutoModelForCausalLM.from_pretrained("{folder / "model"}")',
    ]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> tuple[JobArguments, MaQDTrainingArguments]:
    """Command line to arguments; the defaults are those of the embedded job."""
    parser = HfArgumentParser([JobArguments, MaQDTrainingArguments])  # type: ignore[list-item]
    parser.set_defaults(
        output_dir="runs/smollm2-135m-4bit",
        lr_scheduler_type="cosine",
        warmup_steps=2,
        per_device_train_batch_size=1,
        logging_steps=1,
        save_strategy="no",
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


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the job; returns the content of metrics.json (nothing in processes but the first)."""
    job = Job(*parse(arguments))
    run = job.run
    with run.stage("load"):
        job.load()
    alone = job.training.main_process_first(local=False, desc="start values")
    with alone, all_threads(job.training):
        student, norms = job.begin()
    with run.stage("training"):
        trainer = job.train(student, norms)
        if not job.first:
            return {}
        shutil.rmtree(job.handed_over, ignore_errors=True)
        # without accelerate's autocast around the forward: measure as the packed model runs
        student = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        job.perplexity(student, "trained")
        del trainer
    with run.stage("packing"):
        packed = job.pack(student)
        job.perplexity(packed, "reloaded")
    with run.stage("sample"):
        print("  ", job.sample(packed))
    job.finish()
    return run.metrics


if __name__ == "__main__":
    main()
