"""The trainer under the name it had; new code imports ``maqd_hf.training``."""

from .training import MaQDTrainer, MaQDTrainingArguments, last_complete_checkpoint

__all__ = ["MaQDTrainer", "MaQDTrainingArguments", "last_complete_checkpoint"]
