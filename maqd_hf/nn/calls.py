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
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

T = TypeVar("T")

NO_BACKWARD = -1
KEPT = 64  # so many of the last calls are known even if nothing of their outputs is left


def running_backward() -> int:
    """Number of the backward that runs in this thread; ``NO_BACKWARD`` also under a compiler."""
    return NO_BACKWARD if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


@dataclass
class Nodes:
    """Autograd nodes that one thread made in a row; ``stop`` is None while it goes on. Nobody but
    the thread changes it."""

    thread: object
    start: int
    stop: int | None = None

    def __contains__(self, number: int) -> bool:
        return self.start <= number and (self.stop is None or number < self.stop)


class Call(Generic[T]):
    """One call: who was called, what was ``given``, and which ``nodes`` were made for it.

    ``backward`` is the one inside which the call was made.
    """

    def __init__(self, entrance: object, given: T) -> None:
        self.entrance, self.given, self.backward = entrance, given, running_backward()
        self.nodes: list[Nodes] = []

    def add(self, more: Nodes) -> None:
        """Note that these nodes of the running thread were made for this call too."""
        last = next((nodes for nodes in reversed(self.nodes) if nodes.thread is more.thread), None)
        if last is not None and last.stop == more.start:
            last.stop = more.stop
        elif more.start != more.stop:
            self.nodes.append(more)


class _PerThread(threading.local):
    """What a thread knows of the calls of one model.

    ``thread`` stands for it: its ident may be another's later. ``stack``: calls under way.
    ``given``: what a compiled layer is to find, changed in place, as compilers see that. ``seen``:
    the number of the next node when one of our layers ran last. ``again``: the node that asked for
    a layer last, and the calls it may be of.
    """

    def __init__(self) -> None:
        self.thread = object()
        self.stack: list[Call[Any]] = []
        self.given: list[Any] = []
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
        self._here = _PerThread()
        self._known: dict[int, weakref.ref[Call[T]]] = {}  # by id
        self._recent: deque[Call[T]] = deque(maxlen=KEPT)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def enter(self, entrance: object, given: T) -> None:
        """Begin a call of ``entrance``; ``leave`` ends it, whatever happens between."""
        call = Call(entrance, given)
        self._here.stack.append(call)
        self._settle()
        if not torch.compiler.is_compiling():
            start = self._here.seen = torch.autograd._get_sequence_nr()
            call.nodes.append(Nodes(self._here.thread, start))
            self._remember(call)

    def _remember(self, call: Call[T]) -> None:
        known, key = self._known, id(call)
        known[key] = weakref.ref(call, lambda _: known.pop(key, None))

    def leave(self, entrance: object, output: Any = None) -> None:
        """End the innermost call of ``entrance``, and those inside it that an exception ended.

        A call that was not entered does not matter. The graph of ``output`` keeps the call alive.
        """
        stack = self._here.stack
        if not any(call.entrance is entrance for call in stack):
            return
        while True:
            call = stack.pop()
            ended, call.entrance = call.entrance, None  # who was called may go before its graph
            if not torch.compiler.is_compiling():
                self._end(call, output)
            self._settle()
            if ended is entrance:
                return

    def _settle(self) -> None:
        self._here.given[:] = [call.given for call in self._here.stack[-1:]]

    def _end(self, call: Call[T], output: Any) -> None:
        nodes = call.nodes[0]
        nodes.stop = self._here.seen = torch.autograd._get_sequence_nr()
        if nodes.start == nodes.stop:  # no backward will come
            self._known.pop(id(call), None)
            return
        self._recent.append(call)
        for tensor in _pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(partial(self._backward_arrives, call))

    def _backward_arrives(self, call: Call[T], *_: Any) -> None:
        """Tell compiled layers, which cannot ask for their node, that a backward is in ``call``.

        The hook stands at an output of the call and keeps it alive. A backward comes to earlier
        calls later, at hooks of their own.
        """
        self._here.given[:] = [call.given]
        torch.autograd.Variable._execution_engine.queue_callback(self._settle)

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
        if torch.compiler.is_compiling():
            return list(self._here.given)
        stack, backward = self._here.stack, running_backward()
        if stack and stack[-1].backward == backward:
            found = stack[-1:]
        else:
            found = [] if backward == NO_BACKWARD else self._run_again(backward)
        self._here.seen = torch.autograd._get_sequence_nr()
        return [call.given for call in found]

    def _run_again(self, backward: int) -> list[Call[T]]:
        """The calls whose layer this backward may be running again."""
        node = torch._C._current_autograd_node()
        if node is None:
            return []
        asked = (backward, node._sequence_nr())
        if self._here.again[0] != asked:
            self._here.again = (asked, self._makers(asked[1]))
        found = self._here.again[1]
        if len(found) == 1:
            # These nodes are of the same call: a checkpoint inside this one asks by them.
            here, now = self._here, torch.autograd._get_sequence_nr()
            found[0].add(Nodes(here.thread, here.seen, now))
        return found

    def _makers(self, number: int) -> list[Call[T]]:
        """The innermost call of each thread that made a node of this number."""
        makers: dict[object, tuple[int, Call[T]]] = {}
        known = self._known.copy().values()  # other threads change it meanwhile
        for call in [call for ref in known if (call := ref()) is not None]:
            for nodes in call.nodes:
                if number in nodes and nodes.start >= makers.get(nodes.thread, (0,))[0]:
                    makers[nodes.thread] = (nodes.start, call)
        return list({id(call): call for _, call in makers.values()}.values())
