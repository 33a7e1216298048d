"""Small trainings for the tests: text, models in training state, trainers and what to compare."""

import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    TrainerCallback,
)

from maqd_hf import MaQDConfig, quantize_model
from maqd_hf.nn import ActivationQuantizer
from maqd_hf.training.trainer import MaQDTrainer, MaQDTrainingArguments

LENGTH, STEPS = 24, 6


def blocks(count: int = 48) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(259, (count, LENGTH), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def uneven_blocks() -> list[dict[str, list[int]]]:
    """Blocks of which the labels count from another position on in each."""
    rows = blocks()
    for i, row in enumerate(rows):
        row["labels"] = [-100] * (i * 5 % LENGTH) + row["labels"][i * 5 % LENGTH :]
    return rows


def to_qat(model: nn.Module, **settings: Any) -> Any:
    """Quantized in place, with activation steps that need no calibration."""
    quantize_model(model, MaQDConfig(**settings))
    for module in model.modules():
        if isinstance(module, ActivationQuantizer) and module.log_step is not None:
            module.set_step(0.05)
    return model


def arguments(folder: Path, **settings: Any) -> MaQDTrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lbn_norms": ["*"],
        "lr_scheduler_type": "constant",
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return MaQDTrainingArguments(**defaults | settings)


def trainer_for(
    model: nn.Module, folder: Path, kind: type[MaQDTrainer] = MaQDTrainer, **settings: Any
) -> MaQDTrainer:
    own = ("teacher", "train_dataset", "callbacks")
    init = {name: settings.pop(name) for name in own if name in settings}
    init.setdefault("train_dataset", blocks())
    return kind(model, arguments(folder, **settings), eval_dataset=blocks(8), **init)


def assert_equal_states(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor,
            theirs[name],
            rtol=0,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, n=name: n + m,
        )


def first_gradients(model: nn.Module, folder: Path, **settings: Any) -> dict[str, Tensor]:
    """Gradients of the first optimizer step."""
    seen: dict[str, Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            named = model.named_parameters()
            seen.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    settings = {"max_grad_norm": 0.0, "max_steps": 1, "lbn_end": 1.0} | settings
    trainer_for(model, folder, callbacks=[Keep()], **settings).train()
    return seen


def finished(model: nn.Module, folder: Path, **settings: Any) -> MaQDTrainer:
    trainer = trainer_for(model, folder, **settings)
    trainer.train()
    return trainer


class InterruptAt(TrainerCallback):
    """Ctrl-C in the middle of a step, or an exception after it."""

    def __init__(self, step: int, times: int = 1, after: bool = False) -> None:
        self.step, self.times, self.after = step, times, after

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step and not self.after:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.after:
            raise KeyboardInterrupt
