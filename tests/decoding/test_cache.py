"""The library's keys and values inside transformers' caches: static ones, graphs, 8 bits."""

import copy
import gc
import pickle

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from maqd_hf import use_native
from maqd_hf.decoding.cache import NativeStaticLayer
from maqd_hf.decoding.forward import CACHE_NAME, NativeForward
from maqd_hf.kernels.key_values import FixedKeyValues, KeyValues
from tests.support.decoders import KNOWS_LENGTH, assert_equal, knows_length, packed

LOWEST = torch.finfo(torch.float32).min
IDS = torch.arange(3, 3 + 24).view(2, 12)


def static(model, positions=20):
    return StaticCache(config=model.config, max_cache_len=positions)


@pytest.fixture
def steps(monkeypatch):
    """How often a graph called the native step."""
    calls = []
    step = NativeForward.step

    def counted(self, *args):
        calls.append(args)
        return step(self, *args)

    monkeypatch.setattr(NativeForward, "step", counted)
    return calls


# ------------------------------------------------------------------------------ static caches


@torch.no_grad()
@knows_length
@pytest.mark.parametrize("native_first", [True, False])
def test_own_forward_and_native_share_a_static_cache(best, native_first):
    model = packed()
    whole = model(IDS).logits[:, -1]
    cache = static(model)
    for part, turn in zip(IDS.split(4, dim=1), range(3), strict=True):
        use_native(model, (turn % 2 == 0) == native_first)
        last = model(part, **{CACHE_NAME: cache}, use_cache=True).logits[:, -1]
    assert isinstance(cache.layers[0], NativeStaticLayer) and cache.get_seq_length() == 12
    assert_equal(last, whole)


@torch.no_grad()
def test_a_static_cache_is_reset_and_copied(best):
    model = packed()
    cache, empty = static(model), model(IDS[:, :4]).logits
    model(IDS[:, :7], **{CACHE_NAME: cache}, use_cache=True)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        last = model(IDS[:, 7:], **{CACHE_NAME: other}, use_cache=True).logits[:, -1]
        assert_equal(last, model(IDS).logits[:, -1])
    assert cache.get_seq_length() == 7
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_equal(model(IDS[:, :4], **{CACHE_NAME: cache}, use_cache=True).logits, empty)


@torch.no_grad()
def test_a_mask_for_every_query_gives_what_one_for_all_gives(best):
    """generate() hands a static cache's mask over as (batch, 1, queries, positions)."""
    model = packed()
    columns = torch.ones(2, 12, dtype=torch.bool)
    columns[0, :5] = False
    causal = torch.ones(12, 12, dtype=torch.bool).tril() & columns[:, None, None]
    positions = (columns.cumsum(1) - 1).clamp(min=0)
    expected = model(IDS, attention_mask=columns.long(), position_ids=positions).logits
    floats = [torch.zeros(2, 1, 12, 12).masked_fill(~causal, low) for low in (LOWEST, -torch.inf)]
    for mask in (causal, *floats):
        got = model(IDS, attention_mask=mask, position_ids=positions).logits
        assert model.forward.problem is None
        assert torch.equal(got[columns], expected[columns])


@torch.no_grad()
def test_masks_that_are_not_causal_are_the_models(best, caplog):
    model = packed()
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    assert not torch.equal(model(IDS, attention_mask=mask).logits, model(IDS).logits)
    assert "not causal" in caplog.text


@torch.no_grad()
@pytest.mark.skipif(KNOWS_LENGTH, reason="static caches of this transformers version do")
def test_static_caches_that_do_not_know_their_length_are_the_models(best):
    model = packed()
    whole, cache = model(IDS).logits[:, -1], static(model)
    for past, part in zip((0, 6), IDS.split(6, dim=1), strict=True):
        given = {CACHE_NAME: cache, "cache_position": torch.arange(past, past + 6)}
        last = model(part, **given, use_cache=True).logits[:, -1]
    assert_equal(last, whole)
    assert type(cache.layers[0]) is StaticLayer


@torch.no_grad()
@knows_length
def test_static_caches_the_library_leaves_alone(best, caplog):
    model = packed()
    cache = static(model)
    model(IDS, **{CACHE_NAME: cache}, use_cache=True)
    with pytest.raises(ValueError, match="21 positions: this static cache holds 20"):
        model(IDS[:, :9], **{CACHE_NAME: cache}, use_cache=True)
    assert "21 positions in a static cache of 20" in caplog.text
    with pytest.raises(ValueError, match="1 sequences in a cache for 2"):
        model(IDS[:1, :1], **{CACHE_NAME: cache}, use_cache=True)
    assert "a static cache for 2 sequences, not 1" in caplog.text
    with pytest.raises(ValueError, match=r"keys \(2, 2, 21, 16\) for a static cache of"):
        cache.layers[0].keys = torch.zeros(2, 2, 21, 16)


def test_a_fixed_store_does_not_grow():
    store = FixedKeyValues.empty(KeyValues(2, 1, 2, 8), 5)
    store.reserve(5)
    with pytest.raises(ValueError, match="6 positions: this static cache holds 5"):
        store.reserve(6)


# ------------------------------------------------------------------------------------- graphs


@torch.no_grad()
@knows_length
@pytest.mark.parametrize("kv_cache", ["float32", "int8"])
def test_a_compiled_step_is_one_operator(best, steps, kv_cache):
    model = packed(embedding_levels=255)
    use_native(model, kv_cache=kv_cache)
    whole = model(IDS).logits
    cache = static(model)
    model(IDS[:, :4], **{CACHE_NAME: cache}, use_cache=True)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    for position in range(4, 12):
        logits = run(
            IDS[:, position : position + 1],
            **{CACHE_NAME: cache},
            use_cache=True,
            position_ids=torch.tensor([[position]]),
        ).logits
        assert_equal(logits[:, 0], whole[:, position])
    assert len(steps) == 8 and cache.get_seq_length() == 12


@torch.no_grad()
@knows_length
def test_a_graph_outlives_neither_its_model_nor_foreign_caches(best, steps):
    model = packed(embedding_levels=255)
    run = torch.compile(model, fullgraph=True, backend="eager")
    fresh = run(IDS, **{CACHE_NAME: static(model)}, use_cache=True)  # no step has filled it
    assert_equal(fresh.logits, model(IDS).logits)
    assert not steps
    cache = static(model)
    model(IDS, **{CACHE_NAME: cache}, use_cache=True)
    twin = copy.deepcopy(model)
    assert twin.forward.number != model.forward.number
    number = twin.forward.number
    del twin
    gc.collect()
    store, position = cache.layers[0].store, torch.tensor([[12]])
    with pytest.raises(RuntimeError, match="deleted"):
        torch.ops.maqd.decode(
            IDS[:, :1], position, None, store.keys, store.values, None, store.length, 20, number, 9
        )


@knows_length
def test_generate_compiles_the_native_step(best, steps):
    model = packed(embedding_levels=255)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    plain = model.generate(IDS, attention_mask=mask, max_new_tokens=8, do_sample=False)
    compiling = CompileConfig(fullgraph=True, backend="aot_eager")
    compiling._compile_all_devices = True  # else only GPUs' models are compiled
    options = {"cache_implementation": "static", "compile_config": compiling}
    text = model.generate(IDS, attention_mask=mask, max_new_tokens=8, do_sample=False, **options)
    assert len(steps) == 7
    assert torch.equal(text, plain)


# -------------------------------------------------------------------------------------- 8 bits


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "odd widths", "qwen3"])
def test_bytes_are_within_half_a_step_of_the_floats(isa, family):
    model = packed(family, activation_levels=None)
    caches = {}
    for kind in ("float32", "int8"):
        use_native(model, kv_cache=kind)
        caches[kind] = DynamicCache(config=model.config)
        model(IDS, **{CACHE_NAME: caches[kind]}, use_cache=True)
    # the first block's inputs do not depend on the cache
    for name in ("keys", "values"):
        plain, coarse = (getattr(caches[kind].layers[0], name) for kind in caches)
        step = plain.abs().amax(-1, keepdim=True) / 127
        error = (coarse - plain).abs() / step
        assert 0.1 < float(error.max()) < 0.5001


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 5)])
def test_the_library_reads_bytes_as_it_writes_them(isa, shape):
    """Logits are those of the model's own attention over what the cache says it holds."""
    model = packed(activation_levels=None)
    use_native(model, kv_cache="int8")
    ids, follow = torch.randint(3, 250, shape), torch.randint(3, 250, (shape[0], 1))
    cache = DynamicCache(config=model.config)
    model(ids, **{CACHE_NAME: cache}, use_cache=True)
    floats = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        floats.update(layer.keys, layer.values, index)
    got = model(follow, **{CACHE_NAME: cache}, use_cache=True).logits
    use_native(model, False)
    expected = model(follow, **{CACHE_NAME: floats}, use_cache=True).logits
    # the new position itself is bytes in one and floats in the other
    error = (got - expected).norm() / expected.norm()
    assert float(error) < 0.01


@torch.no_grad()
def test_torch_and_library_store_the_same_bytes(isa):
    """Both sides append to one cache: the same states become the same codes and scales."""
    model = packed(activation_levels=None)
    states = []
    for native in (True, False):
        use_native(model, kv_cache="int8")
        cache = DynamicCache(config=model.config)
        model(IDS[:, :2], **{CACHE_NAME: cache}, use_cache=True)
        store = cache.layers[0]._store
        if not native:
            use_native(model, False)
        model(IDS[:, 2:3], **{CACHE_NAME: cache}, use_cache=True)
        states.append((store.values.read(0, 3), store.values.keys.dtype))
    (ours, dtype), (theirs, _) = states
    assert dtype == torch.int8
    for mine, other in zip(ours, theirs, strict=True):
        step = mine.abs().amax(-1, keepdim=True) / 127
        off = (mine - other).abs() / step
        assert float((off > 1e-3).float().mean()) < 0.01 and float(off.max()) < 1.001


def test_a_cache_of_bytes_serves_every_way_to_generate(best):
    model = packed(embedding_levels=255)
    use_native(model, kv_cache="int8")
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        out = model.generate(IDS, attention_mask=mask, max_new_tokens=8, do_sample=False, **options)
        assert out.shape == (2, 20)
    for text in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert text.forward.kv_cache == "int8"


@torch.no_grad()
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38, 0.0])
def test_any_state_becomes_bytes_without_touching_another_sequence(isa, bad):
    """Defined for every input: no crash, and the other sequence is not touched."""
    model = packed(activation_levels=None)
    use_native(model, kv_cache="int8")
    embeds = torch.randn(2, 5, 64)
    clean = model(inputs_embeds=embeds).logits
    embeds[0, 2] = bad
    spoiled = model(inputs_embeds=embeds).logits
    assert torch.equal(spoiled[1], clean[1])
    assert torch.equal(spoiled[0, :2], clean[0, :2])


def test_other_types_are_refused(best):
    with pytest.raises(ValueError, match="kv_cache='int4': must be one of"):
        use_native(packed(), kv_cache="int4")
    with pytest.raises(ValueError, match="float32"):
        KeyValues(1, 1, 1, 8, "int4")
