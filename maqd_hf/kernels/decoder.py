"""All blocks of a pre-norm decoder in one call of the compiled library (``csrc/decoder.c``).

Here are the C structures and the call; the keys and values both sides read are in ``key_values``.
Which models have this shape is said by ``maqd_hf.decoding``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .key_values import KeyValues, KeyValueType
from .loader import FLOATS, library, path_number, pointer
from .native import NativeWeight, Table, TableStruct, WeightStruct
from .norm import NativeNorm, NormStruct

# Of a call: scratch memory grows with them, and what a layer writes should still be cached when the
# next one reads it. With 512, 264, 132 and 96 a prefill of 512 tokens (SmolLM2-135M, 2 bits) takes
# 532, 508, 503 and 513 ms on one thread, 280, 270, 275 and 284 on two (second-level cache: 1 MiB).
MAX_TOKENS = 256


class _Linear(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.POINTER(WeightStruct)),
        ("step", ctypes.c_float),
        ("levels", ctypes.c_int32),
        ("own_first", ctypes.c_int32),
    ]


_NORMS = ("input_norm", "post_norm", "query_norm", "key_norm")
_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, NormStruct) for name in _NORMS),
        *((name, _Linear) for name in _LINEARS),
        ("window", ctypes.c_int64),
        ("rotates", ctypes.c_int64),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("blocks", "hidden", "heads", "kv_heads", "head_dim", "intermediate")
        ),
        ("attention_scale", ctypes.c_float),
        ("rope_scale", ctypes.c_float),
        ("frequencies", ctypes.c_void_p),
        ("block", ctypes.POINTER(_Block)),
        ("norm", NormStruct),
        ("table", ctypes.POINTER(TableStruct)),
        ("head", _Linear),
        *((name, ctypes.c_int32) for name in ("floats", "group_steps")),
        ("activation", ctypes.c_int32),
    ]


ACTIVATIONS = ("swiglu", "relu", "gelu_tanh")
"""Of the feed-forward part, in the library's order; the first has a gate."""


class _Call(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "tokens", "past", "capacity", "value_stride")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "hidden",
                "ids",
                "logits",
                "positions",
                "first",
                "mask",
                "keys",
                "values",
                "key_scales",
                "value_scales",
            )
        ),
    ]


@dataclass(frozen=True)
class LinearStep:
    """A packed layer and its activation step; ``step=0``: one per token."""

    weight: NativeWeight
    step: float
    own_first: bool

    def struct(self, keep: list[object]) -> _Linear:
        """The C structure; what it points to is added to ``keep``."""
        keep.append(self.weight)
        weight = ctypes.pointer(self.weight.struct)
        levels = self.weight.activation_levels or 0
        return _Linear(weight, self.step, levels, self.own_first)


@dataclass(frozen=True)
class BlockStep:
    """One block: norms of the residual stream and, where the model has them, of heads.

    ``q`` may be all of q, k and v, one below the other, and stands alone then; ``gate`` belongs to
    gated activations. ``window``: positions a token sees, itself one of them; 0: all before it.
    ``rotates``: whether queries and keys are, where the decoder has frequencies.
    """

    norms: dict[Literal["input_norm", "post_norm", "query_norm", "key_norm"], NativeNorm]
    linears: dict[Literal["q", "k", "v", "o", "gate", "up", "down"], LinearStep]
    window: int = 0
    rotates: bool = True


@dataclass
class NativeDecoder:
    """The blocks and the final norm of a model, ready to be called.

    ``frequencies`` (head_dim / 2,): of the rotary embedding, whose sines and cosines are multiplied
    by ``rope_scale``; None: queries and keys are not rotated. ``learned`` (positions, hidden):
    added to the embeddings. ``table`` and ``head`` where the library shall look up the embeddings
    and compute the logits too.
    """

    blocks: Sequence[BlockStep]
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
    head: LinearStep | None = None
    _keep: list[object] = field(default_factory=list)

    def __post_init__(self) -> None:
        structs = (_Block * len(self.blocks))()
        for struct, block in zip(structs, self.blocks, strict=True):
            for name, norm in block.norms.items():
                setattr(struct, name, norm.struct)
            for layer, linear in block.linears.items():
                setattr(struct, layer, linear.struct(self._keep))
            struct.window, struct.rotates = block.window, block.rotates
        frequencies = self.frequencies
        if frequencies is not None:
            frequencies = frequencies.detach().float().contiguous()
        self._keep += [structs, frequencies]
        self.hidden = self.norm.features
        self._struct = _Decoder(
            len(self.blocks),
            self.hidden,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.blocks[0].linears["up"].weight.rows,
            self.attention_scale,
            self.rope_scale,
            pointer(frequencies),
            ctypes.cast(structs, ctypes.POINTER(_Block)),
            self.norm.struct,
            ctypes.pointer(self.table.struct) if self.table else None,
            self.head.struct(self._keep) if self.head else _Linear(),
            any(linear.weight.activation_levels is None for linear in self._linears()),
            any(linear.weight.group_steps for linear in self._linears()),
            ACTIVATIONS.index(self.activation),
        )

    def _linears(self) -> Iterator[LinearStep]:
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
        batch, tokens = inputs.shape[:2]
        past = self._check(inputs, positions, store, first, mask)
        if self.learned is not None:
            states = self.table(inputs) if self.table and inputs.dim() == 2 else inputs.float()
            inputs = states + self.learned[positions.clamp(min=0)].float()  # padding may have -1
        if inputs.dim() == 2:
            assert self.table is not None
            inputs = self.table.check(inputs)
        else:
            inputs = inputs.detach().float().clone(memory_format=torch.contiguous_format)
        out, last = inputs, None
        if inputs.dim() == 2:
            out = torch.empty(batch, tokens, self.hidden, **FLOATS)
        if logits and self.head:
            last = torch.empty(batch, 1, self.head.weight.rows, **FLOATS)
        positions = positions.long().contiguous()
        first, mask = (None if t is None else t.bool().contiguous() for t in (first, mask))
        step = max(1, MAX_TOKENS // max(batch, 1))
        if tokens <= step:
            self._run(inputs, out, last, positions, store, past, first, mask)
            return out if last is None else last
        store.reserve(past + tokens)  # at once, or every piece would copy what is there
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            piece = out[:, part].contiguous()
            seen = None if mask is None else mask[:, : past + start + piece.shape[1]].contiguous()
            some_first = None if first is None else first[:, part].contiguous()
            some_positions = positions[:, part].contiguous()
            given = piece if inputs is out else inputs[:, part].contiguous()
            final = last if start + step >= tokens else None
            self._run(given, piece, final, some_positions, store, past + start, some_first, seen)
            out[:, part] = piece
        return out if last is None else last

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
        batch, tokens = positions.shape
        if not batch or not tokens:
            return
        store.reserve(past + tokens)
        call = _Call(
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
            *((pointer(None),) * 2 if store.scales is None else map(pointer, store.scales)),
        )
        lib = library()
        assert lib is not None
        failed = lib.maqd_decode(
            ctypes.byref(self._struct), ctypes.byref(call), path_number(), torch.get_num_threads()
        )
        if failed:
            raise MemoryError(f"no scratch memory for {batch} x {tokens} tokens")
        store.fill(past + tokens)
