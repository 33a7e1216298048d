"""What the library answers to a call, and whether the model itself would answer the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..kernels.key_values import KeyValues, KeyValueType
from .cache import adopt
from .call import Call, read_call
from .plan import Plan

_TRIED = 6  # tokens that both forwards are tried on


def answer(plan: Plan, call: Call, config: Any, kind: KeyValueType) -> tuple[Tensor, Any]:
    """(logits, cache) as the model's own forward would return them."""
    cache = call.cache
    if cache is None and call.use_cache:
        cache = DynamicCache(config=config)
    if cache is None:
        store = plan.decoder.store(call.batch, kind)
    else:
        store = adopt(cache, plan.decoder, call.batch, kind)
    return logits_of(plan, call, store), cache


def logits_of(plan: Plan, call: Call, store: KeyValues) -> Tensor:
    """Logits (batch, tokens asked for, vocabulary); ``store`` holds the call's keys and values
    after it."""
    decoder, inputs = plan.decoder, call.inputs
    if inputs.dim() == 2 and decoder.table is None:
        inputs = plan.anatomy.embedding(inputs)
    first = call.first_tokens() if plan.own_first else None
    last = decoder.head is not None and call.last_alone
    found = decoder(inputs, call.all_positions(), store, first, call.mask, logits=last)
    if last:
        return found.to(plan.dtype)
    return _head(plan, found[:, call.keep], None if first is None else first[:, call.keep])


def _head(plan: Plan, states: Tensor, first: Tensor | None) -> Tensor:
    """Logits of final states (batch, tokens, hidden). A packed head is given the steps of its
    inputs here: by itself it would look for the first tokens of the model's own forward."""
    states, head = states.to(plan.dtype), plan.decoder.head
    if head is None:
        logits: Tensor = plan.anatomy.head(states)
        return logits
    step = None
    if head.step:
        step = torch.tensor([head.step], dtype=torch.float32, device="cpu")
        if first is not None and head.own_first:
            step = torch.where(first.unsqueeze(-1), torch.zeros_like(step), step)  # 0: its own
    return head.weight(states, step)


# ----------------------------------------------------------------------------- the second opinion


@torch.autocast("cpu", enabled=False)
@torch.no_grad()
def disagreement(model: Any, plan: Plan) -> str | None:
    """None where the library answers a few tokens as the model's own forward does, else how not.

    Codes of activations tip over where one forward rounds up and the other down, and that token
    differs then. So the best token behind the first (which sees no other) counts, and how far
    rounding goes is seen by the model's own answer to inputs that differ by a rounding error.
    """
    embedding: Any = plan.anatomy.embedding
    ids = torch.arange(1, _TRIED + 1, device="cpu").unsqueeze(0) * 7919
    try:
        embeds = embedding(ids % embedding.num_embeddings)
        call = read_call({"inputs_embeds": embeds, "use_cache": False}, plan, model.config)
        native, _ = answer(plan, call, model.config, "float32")
        own, moved = (_own(model, inputs) for inputs in (embeds, _moved(embeds)))
    except Exception as error:  # whatever it is, the caller is to get it from the model itself
        return f"trying it ended in {type(error).__name__}: {error}"
    if native.shape != own.shape:
        return f"the library gives logits {tuple(native.shape)}, the model {tuple(own.shape)}"
    far, noise = float(_apart(native, own).min()), float(_apart(moved, own).max())
    allowed = 10 * noise + (1e-3 if plan.dtype == torch.float32 else 0.1)
    if not far <= allowed and own.isfinite().all():
        return (
            f"the library's logits are {far:.1e} from those of the model's own forward, where "
            f"rounding explains {allowed:.1e}"
        )
    return None


def _own(model: Any, embeds: Tensor) -> Tensor:
    logits: Tensor = type(model).forward(model, inputs_embeds=embeds, use_cache=False).logits
    return logits


def _moved(embeds: Tensor) -> Tensor:
    """``embeds`` moved by rounding errors, up and down in turn."""
    signs = torch.ones(embeds.shape[-1], dtype=embeds.dtype, device="cpu")
    signs[::2] = -1
    return embeds * (1 + 8 * torch.finfo(embeds.dtype).eps * signs)


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """How far logits ``a`` are from ``b``, relative to these, at every token behind the first."""
    a, b = a[:, 1:].double(), b[:, 1:].double()
    return (a - b).norm(dim=-1) / b.norm(dim=-1)
