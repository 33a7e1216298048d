"""Stopping and going on: which checkpoints are whole, and what a first Ctrl-C does."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

logger = logging.get_logger(__name__)


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
