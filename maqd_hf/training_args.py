"""``MaQDTrainingArguments``: the settings of quantisation-aware training."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .distillation import Objective


@dataclass
class MaQDTrainingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` and what quantisation-aware training adds.

    Starting points for ``learning_rate`` (latents; extrapolated from published runs, sweep x3
    around them): 3e-5 at 4 bit, 1e-4 at 3, 2e-4 at 2, 3e-4 ternary.
    """

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
    scale_learning_rate: float = field(
        default=1e-4,
        metadata={"help": "For weight scales and activation steps, both logarithms: relative."},
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
        default=None, metadata={"help": "Glob patterns of the norms to open; default: all."}
    )
    calibration_batches: int = field(
        default=4, metadata={"help": "Training batches that set uncalibrated activation steps."}
    )
    quantizer_logging_steps: int | None = field(
        default=None,
        metadata={"help": "Logs at multiples of it look into quantisers; default: all, 0: none."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objective()  # validates the distillation settings
        if self.scale_learning_rate < 0:
            raise ValueError(f"scale_learning_rate={self.scale_learning_rate} must not be negative")

        if self.hidden_distillation < 0:
            raise ValueError(f"hidden_distillation={self.hidden_distillation} must not be negative")

    def objective(self) -> Objective:
        """What a token costs, as these arguments say."""
        return Objective(
            self.distillation_temperature, self.distillation_weight, self.kl_chunk_tokens
        )
