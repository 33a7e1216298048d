"""Quantization-aware training with transformers' Trainer and accelerate.

Imports ``calibration``, ``evaluation`` and below.

- ``trainer``: ``MaQDTrainer``; ``arguments``: ``MaQDTrainingArguments``;
- ``losses``: what a batch costs; ``distillation``: the loss against the float model, with the head
  inside it; ``labels``: which labels count;
- ``norms``: which norms become static; ``callbacks``: the schedule of their gates, agreement of
  ranks, a look inside;
- ``finite``: a run that diverges stops; ``rates``: learning rates that nobody gave;
- ``checkpoints``: when they are saved, which are whole, and what an interrupt does;
  ``run_directory``: a run of several stages that goes on; ``job``: the main job's settings;
- ``memory``: what is spared.
"""

from .arguments import MaQDTrainingArguments
from .checkpoints import last_complete_checkpoint
from .distillation import Objective, distillation_loss
from .trainer import MaQDTrainer

__all__ = [
    "MaQDTrainer",
    "MaQDTrainingArguments",
    "Objective",
    "distillation_loss",
    "last_complete_checkpoint",
]
