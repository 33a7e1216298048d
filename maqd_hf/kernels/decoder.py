"""All blocks of a pre-norm decoder in one call of the compiled library (``csrc/decoder.c``).

Here are the C structures and the call; the keys and values both sides read are in ``key_values``.
Which models have this shape is said by ``maqd_hf.decoding``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .abi import BlockStruct, CallStruct, DecoderStruct, LinearStruct
from .key_values import KeyValues, KeyValueType
from .loader import FLOATS, call, isa_number, pointer
from .native import NativeWeight, Table
from .norm import NativeNorm

# Tokens of a call: scratch memory grows with them, and what a layer writes should still be cached
# when the next one reads it: 508 ms a prefill of 512 tokens in pieces of 264, 532 in one (notebook:
# "Tokens of one call").
MAX_TOKENS = 256


ACTIVATIONS = ("swiglu", "relu", "gelu_tanh")
"""Activations of the feed-forward part, in the library's order; the first has a gate."""


@dataclass(frozen=True)
class LinearPlan:
    """A packed layer and its activation step; ``step=0``: every token has its own."""

    weight: NativeWeight
    step: float
    own_first: bool

    def struct(self) -> LinearStruct:
        """The C structure; points to ``weight``, which must live as long."""
        weight = ctypes.pointer(self.weight.struct)
        levels = self.weight.activation_levels or 0
        return LinearStruct(weight, self.step, levels, self.own_first)


@dataclass(frozen=True)
class BlockPlan:
    """One block: norms of the residual stream and, where the model has them, of heads.

    ``q`` may be all of q, k and v, one below the other, and stands alone then; ``gate`` belongs to
    gated activations. ``window``: positions a token sees, itself one of them; 0: all before it.
    ``rope``: whether queries and keys get rotary embeddings, where the decoder has frequencies.
    """

    norms: dict[Literal["input_norm", "post_norm", "query_norm", "key_norm"], NativeNorm]
    linears: dict[Literal["q", "k", "v", "o", "gate", "up", "down"], LinearPlan]
    window: int = 0
    rope: bool = True


@dataclass
class NativeDecoder:
    """The blocks and the final norm of a model, ready to be called.

    ``frequencies`` (head_dim / 2,) are those of the rotary embedding, whose sines and cosines are
    multiplied by ``rope_scale``; None: there is none. ``learned`` (positions, hidden) is added to
    the embeddings. ``table`` and ``head`` where the library shall look up the embeddings
    and compute the logits too.
    """

    blocks: Sequence[BlockPlan]
    norm: NativeNorm
    heads: int
    kv_heads: int
    head_dim: int
    attention_scale: float
    frequencies: Tensor | None = None
    rope_scale: float = 1.0
    learned: Tensor | None = None
    activation: Literal["swiglu", "relu", "gelu_tanh"] = "swiglu"
    table: Table | None = None
    head: LinearPlan | None = None

    def __post_init__(self) -> None:
        structs = (BlockStruct * len(self.blocks))()
        for struct, block in zip(structs, self.blocks, strict=True):
            for name, norm in block.norms.items():
                setattr(struct, name, norm.struct)
            for layer, linear in block.linears.items():
                setattr(struct, layer, linear.struct())
            struct.window, struct.rope = block.window, block.rope
        frequencies = self.frequencies
        if frequencies is not None:
            frequencies = frequencies.detach().float().contiguous()
        self._kept = structs, frequencies  # what the structure points to, beside the fields
        self.hidden = self.norm.features
        self._struct = DecoderStruct(
            len(self.blocks),
            self.hidden,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.blocks[0].linears["up"].weight.rows,
            self.attention_scale,
            self.rope_scale,
            pointer(frequencies),
            ctypes.cast(structs, ctypes.POINTER(BlockStruct)),
            self.norm.struct,
            ctypes.pointer(self.table.struct) if self.table else None,
            self.head.struct() if self.head else LinearStruct(),
            any(linear.weight.activation_levels is None for linear in self._linears()),
            any(linear.weight.group_steps for linear in self._linears()),
            ACTIVATIONS.index(self.activation),
        )

    def _linears(self) -> Iterator[LinearPlan]:
        for block in self.blocks:
            yield from block.linears.values()
        if self.head:
            yield self.head

    def store(self, batch: int, kind: KeyValueType = "float32") -> KeyValues:
        """An empty key/value store for this model."""
        return KeyValues(len(self.blocks), batch, self.kv_heads, self.head_dim, kind)

    def __call__(
        self,
        inputs: Tensor,
        positions: Tensor,
        store: KeyValues,
        first: Tensor | None = None,
        mask: Tensor | None = None,
        logits: bool = False,
    ) -> Tensor:
        """Final states (batch, tokens, hidden), float32, or logits (batch, 1, vocabulary) of the
        last tokens.

        Args:
            inputs: ids (batch, tokens), where there is a ``table``, or embeddings (batch, tokens,
                hidden).
            positions: (batch, tokens) for the rotary embedding.
            store: earlier keys and values; those of these tokens are appended.
            first: (batch, tokens) bool, tokens that begin a sequence; None: none does.
            mask: (batch, earlier + tokens) bool, False on padding; None: all count.
            logits: ask for logits, where there is a ``head``.

        Raises:
            ValueError: shapes that do not fit together.
            IndexError: an id outside the table.
            MemoryError: no scratch memory.
        """
        past = self._check(inputs, positions, store, first, mask)
        inputs = self._embed(inputs, positions)
        out, last = inputs, None
        if inputs.dim() == 2:
            out = torch.empty(*inputs.shape, self.hidden, **FLOATS)
        if logits and self.head:
            last = torch.empty(len(inputs), 1, self.head.weight.rows, **FLOATS)
        positions = positions.long().contiguous()
        first, mask = (None if t is None else t.bool().contiguous() for t in (first, mask))
        if inputs.shape[1] <= self._most_tokens(inputs):
            self._run(inputs, out, last, positions, store, past, first, mask)
        else:
            self._run_pieces(inputs, out, last, positions, store, past, first, mask)
        return out if last is None else last

    def _embed(self, inputs: Tensor, positions: Tensor) -> Tensor:
        """What the library is given: ids that the table has, or embeddings of our own, which it
        writes to."""
        if self.learned is not None:
            states = self.table(inputs) if self.table and inputs.dim() == 2 else inputs.float()
            inputs = states + self.learned[positions.clamp(min=0)].float()  # padding may have -1
        if inputs.dim() == 2:
            assert self.table is not None  # by _check
            return self.table.check(inputs)
        return inputs.detach().float().clone(memory_format=torch.contiguous_format)

    @staticmethod
    def _most_tokens(inputs: Tensor) -> int:
        """Tokens of every sequence that go into one call."""
        return max(1, MAX_TOKENS // max(len(inputs), 1))

    def _run_pieces(
        self,
        inputs: Tensor,
        out: Tensor,
        logits: Tensor | None,
        positions: Tensor,
        store: KeyValues,
        past: int,
        first: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """``_run`` for one piece of the tokens after the other."""
        tokens, most = inputs.shape[1], self._most_tokens(inputs)
        store.reserve(past + tokens)  # at once, or every piece would copy what is there
        for start in range(0, tokens, most):
            part = slice(start, start + most)
            piece = out[:, part].contiguous()
            self._run(
                piece if inputs is out else inputs[:, part].contiguous(),
                piece,
                logits if start + most >= tokens else None,
                positions[:, part].contiguous(),
                store,
                past + start,
                None if first is None else first[:, part].contiguous(),
                None if mask is None else mask[:, : past + start + piece.shape[1]].contiguous(),
            )
            out[:, part] = piece

    def _check(
        self,
        inputs: Tensor,
        positions: Tensor,
        store: KeyValues,
        first: Tensor | None,
        mask: Tensor | None,
    ) -> int:
        """The number of earlier positions; ``ValueError`` unless all shapes fit together."""
        batch, tokens = inputs.shape[:2]
        past = store.past
        known = self.table is not None if inputs.dim() == 2 else inputs.shape[2:] == (self.hidden,)
        if not known or store.batch != batch or positions.shape != (batch, tokens):
            raise ValueError(
                f"inputs {tuple(inputs.shape)}, positions {tuple(positions.shape)} and a store for "
                f"{store.batch}: want (batch, tokens, {self.hidden}), (batch, tokens), batch"
            )
        for name, given, columns in (("first", first, tokens), ("mask", mask, past + tokens)):
            if given is not None and given.shape != (batch, columns):
                raise ValueError(f"{name} {tuple(given.shape)}: must be ({batch}, {columns})")
        wanted = (len(self.blocks), batch, self.kv_heads)
        if store.shape != wanted or store.head_dim != self.head_dim:
            raise ValueError(
                f"a store for (blocks, batch, kv_heads) {store.shape} and heads of "
                f"{store.head_dim}: this model wants {wanted} and {self.head_dim}"
            )
        return past

    def _run(
        self,
        inputs: Tensor,
        out: Tensor,
        logits: Tensor | None,
        positions: Tensor,
        store: KeyValues,
        past: int,
        first: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """One call: ``inputs`` to ``out``, and to ``logits`` unless None; fills the store."""
        batch, tokens = positions.shape
        if not batch or not tokens:
            return
        store.reserve(past + tokens)
        struct = CallStruct(
            batch,
            tokens,
            past,
            store.capacity,
            store.values.shape[-1],
            out.data_ptr(),
            None if inputs is out else inputs.data_ptr(),
            pointer(logits),
            positions.data_ptr(),
            pointer(first),
            pointer(mask),
            store.keys.data_ptr(),
            store.values.data_ptr(),
            *((None, None) if store.scales is None else map(pointer, store.scales)),
        )
        threads = torch.get_num_threads()
        if call("maqd_decode", self._struct, struct, isa_number(), threads):
            raise MemoryError(f"no scratch memory for {batch} x {tokens} tokens")
        store.fill(past + tokens)
