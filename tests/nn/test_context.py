"""Laws of ``BatchContext``: which tokens are padding and which are first."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2LMHeadModel, LlamaForCausalLM

from maqd_hf.nn import BatchContext, LayerBatchNorm, LinearSpec, MaQDLinear, Masks, NormSpec
from maqd_hf.nn.context import CACHE_NAMES
from tests.support.families import tiny


class Base(nn.Module):
    """A base model in small: takes what transformers pass, shares one context below."""

    def __init__(self) -> None:
        super().__init__()
        self.context = BatchContext()
        spec = NormSpec(first_token="own")
        self.embed = nn.Embedding(10, 8)
        self.norm = LayerBatchNorm(8, spec, context=self.context)
        self.norm.gate.fill_(1)
        linear = LinearSpec(4, 15, first_token="own")
        self.linear = MaQDLinear(8, 8, spec=linear, context=self.context)
        self.linear.activation.set_step(0.2)
        self.context.attach(self)
        self.seen = Masks()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        self.seen = self.context.masks
        return self.linear(self.norm(x))


def seen_by(*args: object, **kwargs: object) -> tuple[list | None, list | None]:
    base = Base()
    base(*args, **kwargs)
    valid, first = (None if mask is None else mask.int().tolist() for mask in base.seen)
    return valid, first


def cache_of(length: int) -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, length, 4), torch.zeros(2, 1, length, 4), 0)
    return cache


IDS = torch.ones(2, 4, dtype=torch.long)
LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


def test_without_a_mask_every_row_starts_at_its_first_column() -> None:
    assert seen_by(IDS) == (None, [[1, 0, 0, 0]] * 2)
    assert seen_by(inputs_embeds=torch.randn(2, 4, 8)) == (None, [[1, 0, 0, 0]] * 2)


@pytest.mark.parametrize(
    ("mask", "first"),
    [
        (LEFT, [[0, 0, 1, 0], [1, 0, 0, 0]]),
        (LEFT.flip(1), [[1, 0, 0, 0], [1, 0, 0, 0]]),
        (torch.tensor([[0, 0, 0, 0], [0, 1, 1, 0]]), [[0, 0, 0, 0], [0, 1, 0, 0]]),
    ],
    ids=["left", "right", "both and none"],
)
def test_the_first_attended_token_is_first(mask: Tensor, first: list[list[int]]) -> None:
    expected = (mask.tolist(), first)
    assert seen_by(IDS, mask) == expected
    assert seen_by(IDS, attention_mask=mask) == expected
    assert seen_by(input_ids=IDS, attention_mask=mask.bool()) == expected


def test_positions_decide_where_they_are_given() -> None:
    packed = torch.tensor([[0, 1, 0, 1]])  # two documents in a row, shared by both samples
    assert seen_by(IDS, position_ids=packed) == (None, [[1, 0, 1, 0]] * 2)
    padded = torch.tensor([[0, 0, 0, 1], [0, 1, 2, 3]])  # padding is given position 0 as well
    assert seen_by(IDS, LEFT, position_ids=padded) == (LEFT.tolist(), [[0, 0, 1, 0], [1, 0, 0, 0]])


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_continued_cache_has_no_first_token(name: str) -> None:
    none = [[0, 0, 0, 0]] * 2
    assert seen_by(IDS, **{name: cache_of(3)}) == (None, none)
    longer = torch.ones(2, 7, dtype=torch.long)
    assert seen_by(IDS, longer, **{name: cache_of(3)}) == (longer[:, 3:].tolist(), none)
    one_token = torch.ones(2, 1, dtype=torch.long)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert seen_by(one_token, mask, **{name: cache_of(2)}) == ([[1]] * 2, [[0]] * 2)
    assert seen_by(IDS, **{name: DynamicCache()})[1] == [[1, 0, 0, 0]] * 2


def test_a_sample_still_in_its_padding_is_first_when_its_text_begins() -> None:
    """Prefill in chunks: the first chunk of sample 0 was padding only."""
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    chunk = torch.ones(2, 2, dtype=torch.long)
    assert seen_by(chunk, mask, past_key_values=cache_of(3))[1] == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, 1, 4, 4), None, torch.ones(3, 4)], ids=["4d", "none", "other batch"]
)
def test_a_mask_of_another_kind_says_nothing_about_padding(mask: Tensor | None) -> None:
    assert seen_by(IDS, attention_mask=mask) == (None, [[1, 0, 0, 0]] * 2)


def test_masks_are_given_out_only_where_they_fit() -> None:
    context, masks = BatchContext(), Masks(LEFT.bool(), torch.zeros(2, 4, dtype=torch.bool))
    with context.given(masks):
        for got, mask in zip(context.masks_for(torch.zeros(2, 4, 8)), masks, strict=True):
            assert torch.equal(got, mask)
        for shape in [(8, 8), (2, 5, 8), (1, 4, 8), (2, 5, 3, 8), (2, 4, 4, 8), (2, 4, 1, 1, 8)]:
            assert context.masks_for(torch.zeros(shape)) == (None, None)
        for shape in [(2, 4, 3, 8), (2, 3, 4, 8)]:  # per head
            valid, _ = context.masks_for(torch.zeros(shape))
            by_token = valid if shape[1] == 4 else valid.transpose(1, 2)
            assert by_token.shape == (2, 4, 3)
            assert torch.equal(by_token[..., 0], masks.valid)


def test_every_forward_has_masks_of_its_own_and_after_it_nothing_is_known() -> None:
    base = Base()
    base(IDS, LEFT)
    assert base.seen.valid is not None and base.context.masks == (None, None)
    base(IDS)
    assert base.seen.valid is None


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_model_has_a_shared_context_of_its_own_that_works(how: str) -> None:
    base = Base()
    base(IDS, LEFT)
    with base.context.given(base.seen):  # a copy is in no call
        other = copy.deepcopy(base) if how == "deepcopy" else pickle.loads(pickle.dumps(base))
        assert other.context.masks == (None, None)
    assert other.context is other.norm.context is other.linear.activation.context
    assert other.context is not base.context
    other.eval()(IDS)
    assert other.seen.valid is None and base.seen.valid is not None
    base.eval()
    for mask in (LEFT, None):
        assert torch.equal(other(IDS, mask), base(IDS, mask))


def test_compiled_with_its_hook_equals_eager() -> None:
    base = Base().eval()
    compiled = torch.compile(copy.deepcopy(base), fullgraph=True, backend="aot_eager")
    for mask in (LEFT, LEFT.flip(1)):
        torch.testing.assert_close(compiled(IDS, mask), base(IDS, mask))


def firsts_during_generation(base: nn.Module, model: nn.Module, mask: Tensor) -> list[Tensor]:
    context, seen = BatchContext(), []
    context.attach(base)
    last = [module for module in base.children() if not isinstance(module, nn.ModuleList)][-1]
    last.register_forward_hook(lambda *_: seen.append(context.masks.first.int()))
    ids = torch.randint(3, 50, mask.shape)
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)
    return seen


def test_generation_meets_a_first_token_once_per_sample(
    tiny_llama: LlamaForCausalLM, tiny_gpt2: GPT2LMHeadModel
) -> None:
    for model in (tiny_llama, tiny_gpt2, tiny("mamba")):  # the last one's cache has no length
        seen = firsts_during_generation(model.base_model, model, LEFT)
        assert [tuple(step.shape) for step in seen] == [(2, 4), (2, 1), (2, 1)]
        assert seen[0].tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
        assert not any(bool(step.any()) for step in seen[1:])
