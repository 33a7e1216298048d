"""What the laws about threads and calls share: small batches, and work in threads."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from maqd_hf.nn import Masks
from tests.support.families import VOCABULARY

THREADS = 4


def ids_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: list[int], length: int, left: bool) -> Tensor:
    """(rows, length): so many tokens each, the rest padding on one side."""
    mask = torch.tensor([[1] * count + [0] * (length - count) for count in rows])
    return mask.flip(1) if left else mask


def masked(layer: nn.Module, x: Tensor, masks: Masks) -> Tensor:
    """``layer(x)`` in a call with these masks."""
    with layer.context.given(masks):
        return layer(x)


def in_threads(work: Callable[[int], None], barrier: threading.Barrier | None = None) -> None:
    """``work(index)`` in all threads at once; the first error of one of them is raised here."""
    errors: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)
            if barrier is not None:
                barrier.abort()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
