"""``MaQDTrainingArguments``: the settings of quantization-aware training."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from . import rates
from .distillation import Objective


@dataclass
class MaQDTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` and what quantization-aware training adds.

    Rates left at None are filled in by the trainer, which knows how many levels the model has:
    ``rates`` says with what, and why.
    """

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Of the latents; default: by their levels."}
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": "Divides teacher's and student's logits in the KL."}
    )
    distillation_weight: float = field(
        default=1.0, metadata={"help": "Share of the KL; the rest is cross entropy on the labels."}
    )
    hidden_distillation: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the last hidden states' squared distance to the teacher's, relative "
            "to the teacher's square; needs a teacher of the same width."
        },
    )
    kl_chunk_tokens: int = field(
        default=256, metadata={"help": "Tokens whose logits exist at once during training."}
    )
    scale_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "For weight scales and activation steps, both logarithms: relative. Default: "
            "ten times the latents'."
        },
    )
    lbn_start: float = field(
        default=0.0, metadata={"help": "Fraction of all steps at which the norms' gate starts."}
    )
    lbn_end: float = field(
        default=0.2, metadata={"help": "Fraction of all steps from which the gate is open (1)."}
    )
    lbn_fixed: float = field(
        default=1.0,
        metadata={
            "help": "Fraction of all steps from which norms train with their running averages as "
            "constants; 1: never, 0.6 is a good start for trainings of many steps."
        },
    )
    lbn_norms: list[str] | None = field(
        default=None,
        metadata={
            "help": "Glob patterns of the norms to open; '*' opens all, default: those that cost "
            "next to nothing, which the trainer finds out."
        },
    )
    calibration_batches: int = field(
        default=4, metadata={"help": "Training batches that set uncalibrated activation steps."}
    )
    checkpoint_share: float = field(
        default=0.0,
        metadata={
            "help": "Checkpoints to continue from are saved as often as they take this share of "
            "the time together; 0: only those of save_strategy."
        },
    )
    quantizer_logging_steps: int | None = field(
        default=None,
        metadata={"help": "Logs at multiples of it look into quantizers; default: all, 0: none."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()  # validates the distillation settings
        if self.scale_learning_rate is not None and self.scale_learning_rate < 0:
            raise ValueError(f"scale_learning_rate={self.scale_learning_rate} must not be negative")

        if not 0 <= self.checkpoint_share <= 1:
            raise ValueError(f"checkpoint_share={self.checkpoint_share} must lie in 0..1")
        if self.hidden_distillation < 0:
            raise ValueError(f"hidden_distillation={self.hidden_distillation} must not be negative")

    def fill_rates(self, weight_levels: int, activation_levels: int | None = None) -> None:
        """Put what ``rates`` says for a model of so many levels where None stands."""
        if self.learning_rate is None:
            self.learning_rate = rates.learning_rate(weight_levels, activation_levels)
        if self.scale_learning_rate is None:
            self.scale_learning_rate = rates.SCALE_RATE * self.learning_rate

    def objective(self) -> Objective:
        """What a token costs, as these arguments say."""
        return Objective(
            self.distillation_temperature, self.distillation_weight, self.kl_chunk_tokens
        )
