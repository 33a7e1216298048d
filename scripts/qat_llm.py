"""Quantize, train, pack, reload and evaluate a small language model: the main job, one command.

Without arguments: SmolLM2-135M-Instruct and 101 Wikipedia articles, both from ordinary packages, to
4-bit weights, 8-bit activations and Layer-Batch Normalization where the budget allows it. A token's
inputs have a step of their own: one learned step a layer (``--activation_scaling static``), which
leaves nothing to compute, starts and ends a perplexity of one higher.

How the time is shared between calibration and training is measured in docs/notebook.md.

    python scripts/qat_llm.py
    python scripts/qat_llm.py --model someone/some-llm --dataset someone/some-text --weight_levels 4
    python scripts/qat_llm.py --metrics results/main_job.json
    torchrun --nproc_per_node 2 scripts/qat_llm.py    # several processes share the training

The run directory holds arguments.json, metrics.json, plot.png, README.md (the model card) and
model/ (the packed model), and generated/ if the model wrote the text itself.

The same command goes on where it was killed, and ends with the same packed bytes: what a stage
leaves is kept in the run directory until the card is written, and the training saves checkpoints
(``--checkpoint_share`` of its time, and one more on Ctrl-C). Other settings than the run's are
refused, ``--overwrite`` begins anew, ``--resume_from_checkpoint true`` insists on a checkpoint. No
stage draws random numbers from what another left: the trainer seeds its own.

With several processes the first does all but the training, and the others wait. ``torchrun`` starts
them; ``accelerate launch`` does on GPUs, but one alone on a CPU without MPI.
"""

from __future__ import annotations

if not __package__:  # run as a file: scripts/__init__.py has not done it
    import torch_environment  # noqa: F401  (before torch)

import argparse
import copy
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    default_data_collator,
)

from maqd_hf import model_size, pack_model, quantize_model
from maqd_hf.calibration import calibrate
from maqd_hf.calibration.static_norms import select_static_norms
from maqd_hf.checkpoint.saving import save_model
from maqd_hf.data.bundled import resolve_model
from maqd_hf.data.self_written import GENERATED, generated_blocks
from maqd_hf.data.text import load_text, tokenize_blocks
from maqd_hf.evaluation.model_card import write_card
from maqd_hf.evaluation.perplexity import PerplexityResult, text_perplexity
from maqd_hf.evaluation.run_report import plot_run, summary
from maqd_hf.evaluation.versions import package_versions
from maqd_hf.training import MaQDTrainer, MaQDTrainingArguments, last_complete_checkpoint
from maqd_hf.training.job import (
    WITHOUT_A_SAY,
    JobArguments,
    asked_checkpoint,
    parse_job,
    settings_of,
)
from maqd_hf.training.run_directory import RunDirectory

_KEPT = {"start values": "start", "static norms": "static", "training": "trained"}
"""Folders of the models that stages leave for the next, until the card is written."""
_MOST_TOKENS = 2_000_000  # of a large dataset; tokenizing more than a short run sees takes minutes


class Job:
    """The stages of the main job, in order, over one run directory."""

    def __init__(self, job: JobArguments, training: MaQDTrainingArguments) -> None:
        self.job, self.training = job, training
        self.config = job.maqd_config()
        folder = Path(str(training.output_dir))
        self.first = training.process_index == 0
        with training.main_process_first(local=False, desc="run directory"):
            if asked_checkpoint(training) is True and last_complete_checkpoint(folder) is None:
                raise SystemExit(f"{folder} holds no complete checkpoint to resume from")
            self.run = RunDirectory(folder, self.first)
            if self.first:
                self.open()

    def open(self) -> None:
        """Begin or continue the run directory; an error ends the program with its message."""
        settings = settings_of(self.job, self.training)
        try:
            self.run.open(settings, WITHOUT_A_SAY, self.job.overwrite)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        except OSError as error:
            message = f"{self.run.folder} cannot be written ({error}): choose another --output_dir"
            raise SystemExit(message) from error

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
            if self.first and not self.done(GENERATED, folder):
                with self.run.stage(GENERATED), all_threads(self.training):
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

    def done(self, stage: str, left: Path) -> bool:
        """Whether a stage was finished, and what it ``left`` is still there."""
        return stage in self.run.stages and left.exists()

    def kept(self, stage: str) -> PreTrainedModel | None:
        """The model that a stage left in the run directory, or None if there is none."""
        folder = self.run.folder / _KEPT[stage]
        return AutoModelForCausalLM.from_pretrained(folder) if self.done(stage, folder) else None

    def make(self, stage: str, work: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The model that ``work`` makes, kept in the run directory: then the stage is done."""
        with self.run.stage(stage):
            model = work()
            if self.first:
                save_model(model, self.run.folder / _KEPT[stage])
        return model

    def prepare(self) -> PreTrainedModel:
        """The model to train, with its static norms chosen; the other processes find it kept."""
        self.run.refresh()
        if self.first and "float model" not in self.run.stages:
            with self.run.stage("float model"):
                self.perplexity(self.teacher, "float")
        chosen = self.kept("static norms")
        if chosen is not None:
            return chosen
        start = self.kept("start values") or self.make("start values", self.start)
        return self.make("static norms", lambda: self.choose_norms(start))

    def trained(self) -> PreTrainedModel:
        """The trained model, as all processes hold it."""
        alone = self.training.main_process_first(local=False, desc="start values")
        with alone, all_threads(self.training):
            trained = self.kept("training")
            student = self.prepare() if trained is None else trained
        return trained or self.make("training", lambda: self.train(student))

    def start(self) -> PreTrainedModel:
        """Convert and calibrate: the best model that needs no training."""
        student = copy.deepcopy(self.teacher)
        report = quantize_model(student, self.config, start="range")  # calibrate searches
        print(report)
        print(calibrate(student, self.first_samples(self.job.calibration_samples)))
        self.run.record(report=_card_report(report))
        self.perplexity(student, "start")
        return student

    def choose_norms(self, student: PreTrainedModel) -> PreTrainedModel:
        """See which norms can be static within the tolerance; the others stay per token."""
        if self.config.layer_batch_norm:
            chosen = select_static_norms(student, [self.first_samples(2)], self.job.lbn_tolerance)
            print(chosen)
            self.run.record(norms={**chosen.to_dict(), "static": chosen.static})
        return student

    def train(self, student: PreTrainedModel) -> PreTrainedModel:
        """Distil the float model into the quantized one."""
        self.training.lbn_norms = list(self.run.metrics.get("norms", {}).get("static", []))
        trainer = MaQDTrainer(
            model=student,
            args=self.training,
            teacher=self.teacher,
            train_dataset=self.blocks,
            processing_class=self.tokenizer,
            data_collator=default_data_collator,
        )
        began = time.perf_counter()
        asked = asked_checkpoint(self.training)
        last = last_complete_checkpoint(self.run.folder)
        trainer.train(asked if isinstance(asked, str) else last)
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
        # without accelerate's autocast around the forward: measure as the packed model runs
        student = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        if self.first:
            self.perplexity(student, "trained")
        return student

    def pack(self, student: Any, folder: Path) -> None:
        """Pack ``student`` in place and save it: what a user of the model will have."""
        report = pack_model(student)
        print(report)
        save_model(student, folder, self.tokenizer)
        size = model_size(student)
        self.run.record(
            report=_card_report(report),
            bits_per_weight=size.bits_per_weight,
            packed_bytes=_file_bytes(folder),
            float_bytes=2 * sum(p.numel() for p in self.teacher.parameters()),
            size=asdict(size),
        )

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
        plot_run(self.run.metrics, self.run.folder / "plot.png")
        write_card(self.run.folder)

    def clean(self) -> None:
        """Delete what only served to continue; checkpoints that the user asked for stay."""
        kept = [self.run.folder / name for name in _KEPT.values()]
        if self.training.save_strategy == "no":
            kept += self.run.folder.glob("checkpoint-*")
        for folder in kept:
            shutil.rmtree(folder, ignore_errors=True)


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


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the job; returns the content of metrics.json (nothing in processes but the first)."""
    job = Job(*parse_job(arguments))
    run = job.run
    if "card" not in run.stages:
        work(job)
    if not job.first:
        return {}
    job.clean()
    if job.job.metrics is not None:
        shutil.copyfile(run.path, job.job.metrics)
    print(summary(run.metrics, run.folder))
    return run.metrics


def work(job: Job) -> None:
    """All stages that are not done yet."""
    run = job.run
    with run.stage("load"):
        job.load()
    folder = run.folder / "model"
    if not job.done("packing", folder):
        trained = job.trained()
        if job.first:
            with run.stage("packing"):
                job.pack(trained, folder)
                job.perplexity(AutoModelForCausalLM.from_pretrained(folder), "reloaded")
    if not job.first:
        return
    packed = AutoModelForCausalLM.from_pretrained(folder)
    if "sample" not in run.stages:
        with run.stage("sample"):
            print("  ", job.sample(packed))
    with run.stage("card"):
        job.finish()


if __name__ == "__main__":
    main()
