"""Stopping and going on: when checkpoints are saved, which are whole, and what a Ctrl-C does."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

logger = logging.get_logger(__name__)

# What a checkpoint costs before one was saved: the model and Adam's two averages of it.
_TENSORS_SAVED, _BYTES_PER_SECOND = 3, 5e8


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in ``folder`` that was written to its end, or None.

    transformers' ``get_last_checkpoint`` takes any folder of that name, also one whose writer was
    killed half-way.
    """
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.split("-")[1].isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True):
        if is_complete(path):
            return str(path)
        logger.warning(f"{path} was cut off while being written and is left out.")
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has a readable trainer state, the last file that is written."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return True


def check_processes(checkpoint: Path, processes: int) -> None:
    """``ValueError`` if another number of ``processes`` wrote ``checkpoint``.

    Each process leaves the state of its random numbers there. With others the samples of a step
    and their order would change half-way.
    """
    wrote = max(len(list(checkpoint.glob("rng_state_*.pth"))), 1)
    if any(checkpoint.glob("rng_state*.pth")) and wrote != processes:
        raise ValueError(
            f"{checkpoint} was written by {wrote} process(es), and this run has {processes}: "
            f"resume with `torchrun --nproc_per_node {wrote}`, or start a new training from its "
            "weights (from_pretrained) in another output_dir"
        )


class CheckpointCadence(TrainerCallback):
    """Asks for a checkpoint whenever all of them together take at most a share of the time.

    Whether one is saved does not change what is trained. The first process decides for all.

    Args:
        share: of the time, in 0..1; 0: never. ``request``: called when one is due.
    """

    def __init__(self, share: float, request: Callable[[], None]) -> None:
        self.share, self.request = share, request

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        tensors = kwargs["model"].parameters()
        size = sum(p.numel() * p.element_size() for p in tensors)
        self._cost = _TENSORS_SAVED * size / _BYTES_PER_SECOND
        self._since = self._asked = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._asked = time.perf_counter()
        due = (self._asked - self._since) * self.share >= self._cost
        if self.share and due and args.process_index == 0 and state.global_step < state.max_steps:
            self.request()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = time.perf_counter()
        self._cost = self._since - self._asked


@contextmanager
def first_interrupt(request_stop: Callable[[], None]) -> Iterator[None]:
    """Turn the first SIGINT within into a request; the next one does what it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    before = signal.getsignal(signal.SIGINT)

    def handler(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        request_stop()

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
