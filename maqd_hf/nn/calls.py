"""Which call of a model a layer runs in, also when a backward runs the layer again.

Several calls of one model can be alive at once: in threads, inside one another, or ended with a
backward still to come, in which gradient checkpointing runs layers again and nobody enters the
model. A call that is under way stands on a stack of its thread. A layer that is run again belongs
to the call that made the autograd node whose backward asks for it: a thread numbers its nodes in
the order in which it makes them. So it does not matter who checkpoints (transformers, a wrapper of
FSDP, the user around one layer), in which of torch's two ways, or in which thread backward runs.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

T = TypeVar("T")

NO_BACKWARD = -1
_KEPT = 64  # calls that are known even if nothing of their outputs is left


def running_backward() -> int:
    """Number of the backward that runs in this thread; ``NO_BACKWARD`` also under a compiler."""
    return NO_BACKWARD if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


class Call(Generic[T]):
    """One call: who was called, what was ``given``, and which autograd nodes were made for it.

    ``nodes`` are ranges [thread, first number, number after the last]; one that has no end yet is
    None there. ``backward`` is the one inside which the call was made.
    """

    def __init__(self, entrance: object, given: T) -> None:
        self.entrance, self.given, self.backward = entrance, given, running_backward()
        self.nodes: list[tuple[int, int, int | None]] = []

    def made(self, number: int) -> dict[int, int]:
        """Threads in which a node of this number was made for this call, each with the range's
        start."""
        return {
            thread: start
            for thread, start, stop in self.nodes
            if start <= number and (stop is None or number < stop)
        }


class _PerThread(threading.local):
    """``stack``: calls under way; ``seen``: the number of the next node when one of our layers ran
    last; ``again``: the node that asked for a layer last, and whose it is."""

    def __init__(self) -> None:
        self.stack: list[Call[Any]] = []
        self.seen = 0
        self.again: tuple[tuple[int, int] | None, list[Call[Any]]] = (None, [])


class Calls(Generic[T]):
    """The calls of one model: those under way, and those that a backward may come back to.

    Safe to use from any number of threads. A copy or a pickle of it is empty.

    >>> calls = Calls()
    >>> with calls.entered("outer"), calls.entered("inner"):
    ...     calls.current()
    ['inner']
    >>> calls.current()
    []
    """

    def __init__(self) -> None:
        self._entered = False  # ever; before, a layer stands alone
        self._here = _PerThread()
        self._known: dict[int, weakref.ref[Call[T]]] = {}  # by id
        self._recent: deque[Call[T]] = deque(maxlen=_KEPT)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def enter(self, entrance: object, given: T) -> None:
        """A call of ``entrance`` begins; ``leave`` ends it, whatever happens between."""
        call = Call(entrance, given)
        self._here.stack.append(call)
        self._entered = True
        if not torch.compiler.is_compiling():
            number = self._here.seen = torch.autograd._get_sequence_nr()
            call.nodes.append((threading.get_ident(), number, None))
            self._remember(call)

    def _remember(self, call: Call[T]) -> None:
        known, key = self._known, id(call)
        known[key] = weakref.ref(call, lambda _: known.pop(key, None))

    def leave(self, entrance: object, output: Any = None) -> None:
        """The innermost call of ``entrance`` ends, and those inside it that an exception ended; one
        that was not entered does not matter. ``output`` remembers the call."""
        stack = self._here.stack
        if not any(call.entrance is entrance for call in stack):
            return
        while True:
            call = stack.pop()
            if not torch.compiler.is_compiling():
                self._end(call, output)
            if call.entrance is entrance:
                return

    def _end(self, call: Call[T], output: Any) -> None:
        stop = self._here.seen = torch.autograd._get_sequence_nr()
        thread, start, _ = call.nodes[0]
        call.nodes[0] = (thread, start, stop)
        if start == stop:  # no backward will come
            self._known.pop(id(call), None)
            return
        self._recent.append(call)
        for tensor in _pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.metadata[f"call {id(call)}"] = call

    @contextmanager
    def entered(self, given: T) -> Iterator[None]:
        """Within this context a call is under way."""
        entrance = object()
        self.enter(entrance, given)
        try:
            yield
        finally:
            self.leave(entrance)

    def current(self) -> list[T]:
        """What the call was given to which the running layer belongs.

        Empty outside all calls. Several, if a backward runs the layer again and more than one
        thread made a node of that number.
        """
        stack = self._here.stack
        if torch.compiler.is_compiling():
            if not stack and self._entered and torch.is_grad_enabled():
                return self._current_uncompiled()  # maybe run again, which a graph cannot ask
            return [call.given for call in stack[-1:]]
        backward = running_backward()
        if stack and stack[-1].backward == backward:
            found = stack[-1:]
        else:
            found = [] if backward == NO_BACKWARD else self._run_again(backward)
        self._here.seen = torch.autograd._get_sequence_nr()
        return [call.given for call in found]

    @torch.compiler.disable
    def _current_uncompiled(self) -> list[T]:
        return self.current()

    def _run_again(self, backward: int) -> list[Call[T]]:
        """Whose layer this backward runs again."""
        node = torch._C._current_autograd_node()
        if node is None:
            return []
        asked = (backward, node._sequence_nr())
        if self._here.again[0] != asked:
            self._here.again = (asked, self._makers(asked[1]))
        found = self._here.again[1]
        if len(found) == 1:
            # These nodes are of the same call: a checkpoint inside this one asks by them.
            start, stop = self._here.seen, torch.autograd._get_sequence_nr()
            if start < stop:
                found[0].nodes.append((threading.get_ident(), start, stop))
        return found

    def _makers(self, number: int) -> list[Call[T]]:
        """The innermost call of each thread that made a node of this number."""
        makers: dict[int, tuple[int, Call[T]]] = {}
        for ref in self._known.copy().values():  # other threads add and remove meanwhile
            call = ref()
            if call is None:
                continue
            for thread, start in call.made(number).items():
                if thread not in makers or start >= makers[thread][0]:
                    makers[thread] = (start, call)
        return list({id(call): call for _, call in makers.values()}.values())
