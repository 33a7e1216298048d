"""Caches with the library's keys and values are ordinary objects: whatever is done to one gives
what the same gives with transformers' own cache."""

import copy
import io
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from maqd_hf import use_native
from maqd_hf.decoding.cache import NativeLayer, NativeStaticLayer
from maqd_hf.decoding.forward import CACHE_NAME
from tests.support.decoders import knows_length, packed

IDS = torch.arange(3, 3 + 24).view(2, 12)


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def edit(name, change):
    def done(cache):
        for layer in cache.layers[:1]:
            change(getattr(layer, name))
        return cache

    return done


def called(name, *args):
    def done(cache):
        getattr(cache, name)(*args)
        return cache

    return done


def assigned(cache):
    cache.layers[1].values = cache.layers[1].values * 0.5
    return cache


def zeroed(states):
    states[:, :, 2:5] = 0


BOTH = {
    "copied": copy.deepcopy,
    "pickled": lambda cache: pickle.loads(pickle.dumps(cache)),
    "saved": saved,
    "copied twice": lambda cache: copy.deepcopy(copy.deepcopy(cache)),
    "keys edited": edit("keys", zeroed),
    "values edited": edit("values", zeroed),
    "keys edited through data": edit("keys", lambda states: states.data.mul_(0.5)),
    "edited and copied": lambda cache: copy.deepcopy(edit("keys", zeroed)(cache)),
    "copied and edited": lambda cache: edit("keys", zeroed)(copy.deepcopy(cache)),
    "assigned": assigned,
    "reordered": called("reorder_cache", torch.tensor([1, 0])),
    "edited and reordered": lambda c: called("reorder_cache", torch.tensor([1, 1]))(
        edit("values", zeroed)(c)
    ),
    "read": lambda cache: edit("keys", lambda states: None)(cache),
    "cropped": called("crop", -3),
    "read and cropped": lambda c: called("crop", -3)(edit("keys", lambda states: None)(c)),
    "edited and cropped": lambda c: called("crop", -3)(edit("keys", zeroed)(c)),
    "reset": called("reset"),
}
DYNAMIC = BOTH | {
    "selected": called("batch_select_indices", torch.tensor([1])),
    "repeated": called("batch_repeat_interleave", 2),
    "edited and repeated": lambda c: called("batch_repeat_interleave", 2)(edit("keys", zeroed)(c)),
}


def continued(model, cache, doing, native):
    """Two calls on a cache that was filled, and treated so, in between."""
    use_native(model, native)
    model(IDS[:, :8], **{CACHE_NAME: cache})
    cache = doing(cache)
    batch = cache.layers[0].keys.shape[0] if doing not in (DYNAMIC["reset"],) else 2
    ids = IDS[:, 8:].repeat(2, 1)[:batch]
    length = cache.get_seq_length()
    found = [model(ids[:, :3], **{CACHE_NAME: cache}).logits]
    found += [model(ids[:, 3:], **{CACHE_NAME: cache}).logits]
    return [*found, int(length), int(cache.get_seq_length())]


def assert_same(got, expected):
    for mine, other in zip(got, expected, strict=True):
        if isinstance(mine, int):
            assert mine == other
        else:
            assert mine.shape == other.shape
            assert float((mine - other).norm() / other.norm()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("doing", DYNAMIC.values(), ids=DYNAMIC.keys())
def test_a_dynamic_cache_is_treated_as_any_other(best, doing):
    model = packed(activation_levels=None)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    got = continued(model, caches[0], doing, True)
    assert isinstance(caches[0].layers[0], NativeLayer)
    assert_same(got, continued(model, caches[1], doing, False))


@knows_length
@torch.no_grad()
@pytest.mark.parametrize("doing", BOTH.values(), ids=BOTH.keys())
def test_a_static_cache_is_treated_as_any_other(best, doing):
    model = packed(activation_levels=None)
    caches = [StaticCache(config=model.config, max_cache_len=20) for _ in range(2)]
    got = continued(model, caches[0], doing, True)
    assert isinstance(caches[0].layers[0], NativeStaticLayer)
    assert_same(got, continued(model, caches[1], doing, False))


@torch.no_grad()
def test_what_is_read_is_what_transformers_own_cache_holds(best):
    model = packed(activation_levels=None)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    model(IDS, **{CACHE_NAME: caches[0]})
    type(model).forward(model, IDS, **{CACHE_NAME: caches[1]})
    for mine, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert mine.keys is mine.keys
        for name in ("keys", "values"):
            states = getattr(mine, name)
            assert torch.allclose(states, getattr(other, name), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_reading_a_cache_of_bytes_changes_nothing(best):
    model = packed(activation_levels=None)
    use_native(model, kv_cache="int8")
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        model(IDS[:, :8], **{CACHE_NAME: cache})
    assert [layer.keys.sum() + layer.values.sum() for layer in caches[0].layers]
    last = [model(IDS[:, 8:], **{CACHE_NAME: cache}).logits for cache in caches]
    assert torch.equal(*last)


@torch.no_grad()
def test_a_prefix_is_shared(best):
    """transformers' recipe: one prefill, and a copy of its cache for every request."""
    model = packed()
    options = {"max_new_tokens": 8, "do_sample": False}
    prefix = DynamicCache(config=model.config)
    model(IDS[:1, :8], **{CACHE_NAME: prefix})
    for ids in (IDS[:1], torch.cat([IDS[:1, :8], IDS[1:, :3]], 1)):
        given = {CACHE_NAME: copy.deepcopy(prefix)}
        assert torch.equal(model.generate(ids, **given, **options), model.generate(ids, **options))
    assert prefix.get_seq_length() == 8


@torch.no_grad()
def test_layers_of_different_batches_are_refused(best):
    model = packed()
    cache = DynamicCache(config=model.config)
    model(IDS, **{CACHE_NAME: cache})
    cache.layers[0].batch_select_indices(torch.tensor([0]))
    with pytest.raises(ValueError, match="different numbers of sequences"):
        model(IDS[:1, :1], **{CACHE_NAME: cache})
