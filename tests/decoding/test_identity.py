"""The native step runs only for exactly the model it knows: after any change to a class, a
function, an attribute, a tensor, a hook or the config, and at any moment, the answer is that of the
model's own forward."""

import copy

import pytest
import torch
from transformers import DynamicCache

from maqd_hf.decoding.forward import CACHE_NAME
from tests.support.decoders import packed
from tests.support.mutations import mutations

LEAST = {"llama": 330, "mistral": 330, "qwen2": 330, "qwen3": 330, "smollm3": 330, "gpt2": 250}
LEAST["opt"] = 260
EDITS = ("in place", "through data", "replaced", "other data")
IDS = torch.tensor([[7, 90, 3, 241, 12, 30, 55]])


def outcome(forward, *args, **kwargs):
    """Logits, or the type of the error."""
    try:
        with torch.no_grad():
            return forward(*args, **kwargs).logits
    except Exception as error:
        return type(error)


def kind(found):
    return found.__name__ if isinstance(found, type) else "logits"


def differs(got, expected):
    """How two outcomes differ, or None."""
    if isinstance(got, type) or isinstance(expected, type):
        return None if got is expected else f"{kind(got)} and {kind(expected)}"
    if torch.equal(got.isfinite(), expected.isfinite()) and not expected.isfinite().all():
        return None
    far = float((got - expected).norm() / expected.norm())
    return None if far < 1e-4 else f"{far:.1e} apart"


def own(model, *args, **kwargs):
    return type(model).forward(model, *args, **kwargs)


def continued(model):
    """The model's cache after all tokens but the last."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :-1], **{CACHE_NAME: cache})
    return cache


@pytest.mark.parametrize("family", LEAST)
def test_any_change_at_any_moment_gives_the_models_own_answer(best, family):
    base = packed(family, activation_levels=None)
    assert base.forward.problem is None, base.forward.problem
    unchanged = outcome(base, IDS)
    wrong, count, felt = [], 0, 0
    for name, change in mutations(base):
        count += 1
        cache = continued(base)
        twin = copy.deepcopy(cache)
        undo = change(base)
        try:
            step = {CACHE_NAME: cache}, {CACHE_NAME: twin}
            pairs = {
                "between two tokens": (
                    outcome(base, IDS[:, -1:], **step[0]),
                    outcome(own, base, IDS[:, -1:], **step[1]),
                ),
                "after a first call": (outcome(base, IDS), outcome(own, base, IDS)),
            }
            if not name.endswith(EDITS):  # those are in what every plan is made of
                base.forward._known = None
                pairs["before the first call"] = outcome(base, IDS), pairs["after a first call"][1]
        finally:
            undo()
        felt += differs(pairs["after a first call"][1], unchanged) is not None
        wrong += [
            f"{name}, {when}: {problem}"
            for when, (got, expected) in pairs.items()
            if (problem := differs(got, expected))
        ]
        again = differs(outcome(base, IDS), unchanged)
        assert again is None, f"{name} was undone: {again}"
        assert base.forward.problem is None, f"{name} was undone: {base.forward.problem}"
    assert not wrong, "\n".join(wrong)
    assert count >= LEAST[family] and felt >= count // 3, (count, felt)
