"""Laws of ``Derived``: what is kept is what the tensors give, whoever asks and whenever."""

import threading

import torch

from maqd_hf.nn.stamp import Derived
from tests.support.calls import THREADS, in_threads


def test_threads_that_make_it_at_once_all_get_it() -> None:
    tensor, made = torch.full((3,), 2.0), Derived()
    barrier, got = threading.Barrier(THREADS), [0.0] * THREADS

    def make() -> float:
        barrier.wait(60)  # none has finished when the last begins
        return float(tensor.sum())

    def work(thread: int) -> None:
        got[thread] = made.get([tensor], make)

    in_threads(work, barrier)
    assert got == [6.0] * THREADS
    assert made.get([tensor], lambda: -1.0) == 6.0


def test_a_change_while_it_is_made_is_not_missed() -> None:
    tensor, made = torch.zeros(3), Derived()

    def make() -> float:
        value = float(tensor.sum())
        tensor.add_(1)  # as another thread might
        return value

    assert made.get([tensor], make) == 0
    assert made.get([tensor], lambda: float(tensor.sum())) == 3
