"""The calls of a model's ``forward`` that the library answers: a closed list.

``read_call`` turns arguments into a ``Call``, in which nothing is left to interpret, or says why
the model itself must answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..kernels.key_values import FixedKeyValues
from ..nn import BatchContext
from ..nn.context import CACHE_NAMES
from .cache import cache_problem, capacity
from .families import UnsupportedError
from .identity import is_captured
from .plan import Plan

_FLAGS = ("output_attentions", "output_hidden_states")  # False asks for nothing
_COUNTS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Call:
    """One forward of the library.

    ``inputs``: ids (batch, tokens), or embeddings (batch, tokens, hidden). ``mask``: (batch, past +
    tokens) bool, False on padding, or None where nothing is. ``positions``: (batch or 1, tokens) as
    they were given, or None. ``keep``: which tokens' logits are wanted, an index of them.
    """

    inputs: Tensor
    mask: Tensor | None
    positions: Tensor | None
    cache: Any
    use_cache: bool
    keep: slice | Tensor
    past: int

    @property
    def batch(self) -> int:
        return self.inputs.shape[0]

    @property
    def tokens(self) -> int:
        return self.inputs.shape[1]

    @property
    def last_alone(self) -> bool:
        """Whether the logits of the last token are all that is wanted."""
        keep = self.keep
        return isinstance(keep, slice) and (self.tokens == 1 or keep.start == -1)

    def first_tokens(self) -> Tensor | None:
        """Which tokens begin a sequence, (batch, tokens) bool; None: none does."""
        if self.past and self.mask is None and self.positions is None:
            return None
        mask = self.mask
        if mask is None:
            shape = (self.batch, self.past + self.tokens)
            mask = torch.ones(shape, dtype=torch.bool, device="cpu")
        return BatchContext.first_tokens(mask, self.tokens, {"position_ids": self.positions})

    def all_positions(self) -> Tensor:
        """(batch, tokens) int64: as given, or counted from the first position of the cache."""
        positions = self.positions
        if positions is None and self.tokens == 1:  # one operator instead of two
            return torch.full((self.batch, 1), self.past, dtype=torch.int64, device="cpu")
        if positions is None:
            positions = torch.arange(self.past, self.past + self.tokens, device="cpu")
        return positions.expand(self.batch, -1)


def read_call(
    given: dict[str, Any], plan: Plan, config: Any, store: FixedKeyValues | None = None
) -> Call:
    """The call that the arguments ``given`` of a forward mean.

    ``store``: earlier positions, where a graph hands them over in the place of a cache.

    Raises:
        UnsupportedError: the call is none that the library answers; the message says why.
    """
    rest = {name: value for name, value in given.items() if value is not None}
    inputs = _inputs(rest.pop("input_ids", None), rest.pop("inputs_embeds", None), plan)
    batch, tokens = inputs.shape[:2]
    caches = [rest.pop(name) for name in CACHE_NAMES if name in rest]
    _want(len(caches) < 2, "two caches")
    cache = caches[0] if caches else None
    use_cache = rest.pop("use_cache", config.use_cache)
    _want(isinstance(use_cache, bool), "use_cache={!r}", use_cache)
    _want(use_cache or cache is None, "use_cache=False with a cache")
    if cache is not None:
        problem = cache_problem(cache, plan.decoder, batch, tokens)
        _want(problem is None, problem or "")
    past = store.past if store else 0 if cache is None else int(cache.get_seq_length())
    limit = store.limit if store else capacity(cache)
    given_mask = rest.pop("attention_mask", None)
    mask = _mask(given_mask, plan, config, (batch, tokens, past, limit))
    positions = _positions(rest.pop("position_ids", None), plan, batch, tokens)
    if positions is None:
        counted = mask is not None or (given_mask is not None and given_mask.dim() != 2)
        _want(not (counted and plan.anatomy.counts_padding), "padding without position_ids")
        _want(past + tokens <= plan.positions, "more than {} positions", plan.positions)
    elif mask is None and cache is None and not use_cache:
        together = tokens == 1 or bool((positions.diff(dim=-1) == 1).all())
        _want(together, "documents told apart by position_ids")
    _check_rest(rest, past, tokens)
    return Call(inputs, mask, positions, cache, use_cache, _keep(given), past)


def _want(fine: bool, problem: str, *about: object) -> None:
    """``UnsupportedError`` unless ``fine``; the message is put together only then."""
    if not fine:
        raise UnsupportedError(problem.format(*about))


def _plain(value: Any) -> bool:
    """Whether ``value`` is a tensor of torch itself, in this computer's memory."""
    return type(value) is Tensor and value.is_cpu


def check_modes() -> None:
    """``UnsupportedError`` under modes of torch that change what operators do: the library would
    not notice them."""
    _want(not torch.is_autocast_enabled("cpu"), "under autocast")
    _want(_get_current_dispatch_mode() is None, "under a mode that intercepts operators")
    _want(not is_captured(), "inside a model that collects hidden states")


def _inputs(ids: Any, embeds: Any, plan: Plan) -> Tensor:
    _want((ids is None) != (embeds is None), "neither input_ids nor inputs_embeds, or both")
    inputs: Any = embeds if ids is None else ids
    _want(_plain(inputs), "inputs that are no plain tensor on the CPU, but {}", type(inputs))
    if ids is None:
        fits = inputs.dim() == 3 and inputs.shape[2] == plan.decoder.hidden
        fits = fits and inputs.dtype == plan.dtype
    else:
        fits = inputs.dim() == 2 and inputs.dtype in _COUNTS
    _want(fits and inputs.numel() > 0, "inputs {} of {}", inputs.shape, inputs.dtype)
    found: Tensor = inputs
    return found


def _positions(positions: Any, plan: Plan, batch: int, tokens: int) -> Tensor | None:
    if positions is None:
        return None
    fits = _plain(positions) and positions.dtype in _COUNTS
    fits = fits and positions.shape in ((batch, tokens), (1, tokens))
    _want(fits, "position_ids that are not (batch, tokens) whole numbers")
    if plan.decoder.learned is not None:
        least, most = (int(bound) for bound in positions.aminmax())
        _want(least >= 0 and most < plan.positions, "positions {} to {}", least, most)
    found: Tensor = positions
    return found


def _check_rest(rest: dict[str, Any], past: int, tokens: int) -> None:
    """The arguments that no part of ``Call`` stands for."""
    rest.pop("logits_to_keep", None)
    _want(rest.pop("return_dict", True) is True, "return_dict=False")
    counted = rest.pop("cache_position", None)  # of older versions: the positions, once more
    if counted is not None:
        end = past + tokens
        same = _plain(counted) and counted.tolist() == list(range(past, end))
        _want(same, "cache_position that does not count from {} to {}", past, end)
    asked = sorted(name for name, value in rest.items() if name not in _FLAGS or value is not False)
    _want(not asked, "called with {}", ", ".join(asked))


def _keep(given: dict[str, Any]) -> slice | Tensor:
    keep = given.get("logits_to_keep")
    if isinstance(keep, Tensor):
        _want(
            _plain(keep) and keep.dim() == 1 and keep.dtype in _COUNTS, "logits_to_keep of tensors"
        )
        return keep
    _want(keep is None or (type(keep) is int and keep >= 0), "logits_to_keep={!r}", keep)
    return slice(-(keep or 0), None)


# --------------------------------------------------------------------------------------- the mask

_Sizes = tuple[int, int, int, int | None]
"""Batch, tokens, earlier positions, and how many a static cache has room for."""


def _mask(mask: Any, plan: Plan, config: Any, sizes: _Sizes) -> Tensor | None:
    """(batch, past + tokens) bool, or None where nothing is hidden."""
    if mask is None:
        return None
    batch, tokens, past, _ = sizes
    _want(_plain(mask), "an attention mask of type {}", type(mask))
    if mask.dim() == 4:
        mask = _mask_of_positions(mask, plan, config, sizes)
    _want(mask.shape == (batch, past + tokens), "an attention mask that is not (batch, positions)")
    found: Tensor = mask.bool()
    return None if bool(found.all()) else found


def _mask_of_positions(mask: Tensor, plan: Plan, config: Any, sizes: _Sizes) -> Tensor:
    """(batch, past + tokens) bool from a mask (batch, 1, tokens, positions) of every query, bool or
    to be added to the scores.

    It must be causal: every token sees what the last one sees, up to itself.
    """
    batch, tokens, past, limit = sizes
    end = past + tokens
    wanted = (batch, 1, tokens, limit or end)
    _want(mask.shape == wanted, "an attention mask {}, where {} is the rule", mask.shape, wanted)
    windows = [block.window for block in plan.decoder.blocks]
    _want(not any(0 < window < end for window in windows), "a mask of its own for sliding windows")
    if mask.dtype == torch.bool:
        _want(config._attn_implementation == "sdpa", "a bool mask that eager attention adds")
        seen = mask[:, 0]
    else:
        _want(mask.dtype == plan.dtype, "an attention mask of {}", mask.dtype)
        seen = mask[:, 0] == 0
        hidden = mask[:, 0] <= torch.finfo(mask.dtype).min
        _want(bool((seen | hidden).all()), "an attention mask with finite biases")
    position = torch.arange(mask.shape[3], device="cpu")
    causal = position <= torch.arange(past, end, device="cpu").unsqueeze(1)
    found = seen[:, -1, :end]
    queries = found[:, past:, None]  # what padding sees is nobody's concern
    same = torch.equal(seen & queries, causal & seen[:, -1:] & queries)
    _want(same, "an attention mask that is not causal")
    return found
