"""The time and memory of a step of quantization-aware training against a plain fine-tune.

    python -m scripts.bench.training --model smollm2-135m-instruct --output training.json
    python -m scripts.bench.training --model A --teacher true --batch_size 1 --length 512

Each way to train is a process of its own that builds its model and then waits; the processes take
single training steps in turn, so that whatever else the machine does hits all of them alike. The
time is the median step's; the peak is the most memory a process held during any step, without that
of the conversion (on a GPU the memory torch allocated, on Linux the resident set with model and
optimizer). The first step of each is a warm-up. Tokens are random: neither number depends on them.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from maqd_hf import MaQDConfig, quantize_model
from maqd_hf.data.bundled import SMOLLM2, resolve_model
from maqd_hf.evaluation.versions import package_versions
from maqd_hf.training.trainer import MaQDTrainer, MaQDTrainingArguments

MIB = 2**20
PLAIN, QAT, DISTILLED = "plain fine-tune", "QAT", "QAT with teacher"


@dataclass
class Arguments:
    """Command line."""

    model: str = field(default=SMOLLM2, metadata={"help": "An id, folder or embedded model."})
    batch_size: int = 4
    length: int = field(default=256, metadata={"help": "Tokens per sample."})
    steps: int = field(default=5, metadata={"help": "Measured steps, after one warm-up step."})
    weight_levels: int = 16
    activation_levels: int = field(default=255, metadata={"help": "0: float activations."})
    group_size: int | None = None
    embedding_levels: int | None = None
    layer_batch_norm: bool = True
    teacher: bool = field(default=False, metadata={"help": "Measure distillation as well."})
    bf16: bool = field(default=False, metadata={"help": "Autocast, all ways to train."})
    cpu: bool = field(default=False, metadata={"help": "Leave a GPU alone."})
    output: str | None = field(default=None, metadata={"help": "Write the results as JSON here."})


class TakeTurns(TrainerCallback):
    """Trains one step whenever the connection says so, and answers with its time and memory."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.connection.recv()
        reset_peak()
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.connection.send((time.perf_counter() - self.began, peak_bytes()))


def reset_peak() -> None:
    """Forget the peak so far; only Linux can do that for the memory of a process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory held since ``reset_peak``."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def work(kind: str, args: Arguments, folder: str, connection: Connection) -> None:
    """Build one way to train and run it, step by step, as the connection asks."""
    transformers.utils.logging.disable_progress_bar()
    settings: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": args.steps + 1,
        "per_device_train_batch_size": args.batch_size,
        "bf16": args.bf16,
        "use_cpu": args.cpu,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    path = resolve_model(args.model)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rows = torch.randint(model.config.vocab_size, (args.batch_size, args.length)).tolist()
    init: dict[str, Any] = {
        "train_dataset": [{"input_ids": row, "labels": row} for row in rows],
        "callbacks": [TakeTurns(connection)],
    }
    if kind == PLAIN:
        Trainer(model, TrainingArguments(**settings), **init).train()
        return
    if kind == DISTILLED:
        init["teacher"] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    config = MaQDConfig(
        weight_levels=args.weight_levels,
        activation_levels=args.activation_levels or None,
        group_size=args.group_size,
        embedding_levels=args.embedding_levels,
        layer_batch_norm=args.layer_batch_norm,
    )
    quantize_model(model, config)
    MaQDTrainer(model, MaQDTrainingArguments(**settings, lbn_norms=["*"]), **init).train()


def measure(args: Arguments) -> dict[str, list[tuple[float, int]]]:
    """Seconds and peak bytes of every step of every way to train, taken in turns."""
    kinds = [PLAIN, QAT, DISTILLED][: 3 if args.teacher else 2]
    spawn = get_context("spawn")
    found: dict[str, list[tuple[float, int]]] = {kind: [] for kind in kinds}
    pipes, processes = {}, []
    with TemporaryDirectory() as folder:
        for kind in kinds:
            pipes[kind], theirs = spawn.Pipe()
            process = spawn.Process(target=work, args=(kind, args, folder, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the death of the process ends our recv
            processes.append(process)
        for _ in range(args.steps + 1):
            for kind in kinds:
                pipes[kind].send(None)
                found[kind].append(pipes[kind].recv())
        for process in processes:
            process.join()
    return {kind: steps[1:] for kind, steps in found.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = HfArgumentParser(Arguments, description=__doc__)  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses(argv)
    rows: list[dict[str, Any]] = []
    for kind, steps in measure(args).items():
        seconds, peaks = zip(*steps, strict=True)
        row = {"kind": kind, "step_seconds": statistics.median(seconds), "peak_bytes": max(peaks)}
        row |= {"all_step_seconds": seconds}
        row["tokens_per_second"] = args.batch_size * args.length / row["step_seconds"]
        first = (rows or [row])[0]
        row["time_ratio"] = row["step_seconds"] / first["step_seconds"]
        row["memory_ratio"] = row["peak_bytes"] / first["peak_bytes"]
        rows.append(row)
        print(
            f"{kind:18} {row['step_seconds']:8.3f} s a step (x{row['time_ratio']:.2f}), "
            f"{row['tokens_per_second']:8.1f} tokens/s, "
            f"{row['peak_bytes'] / MIB:8.0f} MiB (x{row['memory_ratio']:.2f})"
        )
    on_gpu = torch.cuda.is_available() and not args.cpu
    report = {
        "arguments": asdict(args),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        "results": rows,
    }
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
