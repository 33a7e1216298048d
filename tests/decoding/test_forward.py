"""The native decode step against the model's own forward: the same logits, text and caches."""

import copy
import os
import pickle
import threading

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

import maqd_hf
from maqd_hf import MaQDConfig, pack_model, quantize_model, use_native
from maqd_hf.calibration import calibrate_activations
from maqd_hf.decoding.cache import NativeLayer
from maqd_hf.decoding.forward import CACHE_NAME, NativeForward, unsupported
from maqd_hf.nn import LayerBatchNorm
from tests.support.decoders import FAMILIES, SIZES, assert_equal, packed


def static_norms(model):
    """Pack with every norm but the last static, at a statistic of its own for each."""
    for index, norm in enumerate(m for m in model.modules() if isinstance(m, LayerBatchNorm)):
        if norm.spec.statistics == "gated":
            norm.gate.fill_(1)
            norm.batches_seen.fill_(1)
            norm.running_log_ms.fill_(-1.0 + 0.3 * index)


@torch.no_grad()
def both(model, *args, **kwargs):
    """(native, own) outputs of the same call; the native one must really have run."""
    native_forward = model.forward
    assert isinstance(native_forward, NativeForward)
    got = model(*args, **kwargs)
    assert native_forward.decoder is not None and native_forward.problem is None
    assert kwargs.get(CACHE_NAME) is not None or isinstance(got[CACHE_NAME].layers[0], NativeLayer)
    use_native(model, False)
    expected = model(*args, **kwargs)
    use_native(model)
    return got, expected


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_own_forward_in_every_family(isa, family):
    model = packed(family)
    for shape in [(1, 1), (1, 7), (3, 33)]:
        got, expected = both(model, torch.randint(3, 250, shape))
        assert got.logits.shape == expected.logits.shape
        assert_equal(got.logits, expected.logits)


@pytest.mark.parametrize("activation_levels", [None, 15, 16, 255])
@pytest.mark.parametrize("levels", [2, 3, 4, 5, 16, 17, 256])
def test_logits_equal_the_own_forward_at_every_number_of_levels_in_groups(
    isa, levels, activation_levels
):
    model = packed(weight_levels=levels, activation_levels=activation_levels, group_size=32)
    got, expected = both(model, torch.randint(3, 250, (2, 9)))
    assert_equal(got.logits, expected.logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activation_levels", [None, 255])
def test_logits_equal_the_own_forward_where_inputs_are_rotated(isa, family, activation_levels):
    """Odd widths among them: 40 inputs are rotated by eights, 75 not at all."""
    model = packed(family, activation_levels=activation_levels, rotation=512)
    for shape in [(1, 1), (3, 33)]:
        got, expected = both(model, torch.randint(3, 250, shape))
        assert_equal(got.logits, expected.logits)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"odd widths"}))
@pytest.mark.parametrize("levels", [3, 16])
def test_logits_equal_the_own_forward_with_a_step_a_group(isa, family, levels):
    settings = {"activation_scaling": "group", "group_size": 32, "activation_levels": 15}
    model = packed(family, weight_levels=levels, **settings)
    for shape in [(1, 1), (2, 9)]:
        got, expected = both(model, torch.randint(3, 250, shape))
        assert_equal(got.logits, expected.logits)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_clip_ratio": 0.5},
        {"activation_scaling": "group"},
        {"activation_levels": None},
    ],
    ids=str,
)
def test_layers_that_share_an_input_may_round_it_differently(isa, changes):
    settings = {"activation_levels": 15, "activation_clip_ratio": 0.9, "group_size": 32}
    model = packed(**settings, overrides={"*.k_proj": changes})
    for shape in [(1, 1), (3, 33)]:
        got, expected = both(model, torch.randint(3, 250, shape))
        assert_equal(got.logits, expected.logits)


@pytest.mark.parametrize("first_token", ["own", "shared"])
def test_logits_equal_the_own_forward_with_static_norms_and_steps(best, first_token, monkeypatch):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    quantize_model(
        model, MaQDConfig(weight_levels=4, activation_scaling="static", first_token=first_token)
    )
    static_norms(model)
    ids = torch.randint(3, 250, (4, 24))
    calibrate_activations(model, ids, progress=False)
    pack_model(model)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got, expected = both(model, ids[:2, :9])
    assert_equal(got.logits, expected.logits)
    got, expected = both(model, ids[:2, :9], attention_mask=mask, position_ids=positions)
    shown = mask.bool()
    assert_equal(got.logits[shown], expected.logits[shown])


@pytest.mark.parametrize("family", ["qwen3", "sliding", "one slides", "gpt2", "opt"])
def test_token_by_token_equals_at_once(isa, family):
    model = packed(family)
    ids = torch.randint(3, 250, (2, 70))  # beyond the store's first size
    with torch.no_grad():
        once = model(ids).logits
        cache, steps = DynamicCache(config=model.config), []
        for part in ids.split([1, 1, 5, 62, 1], dim=1):
            steps.append(model(part, **{CACHE_NAME: cache}, use_cache=True).logits)
    assert cache.get_seq_length() == 70
    assert_equal(torch.cat(steps, 1), once)


@pytest.mark.parametrize("kv_cache", ["float32", "int8"])
@pytest.mark.parametrize("family", ["llama", "odd widths", "sliding", "qwen3"])
def test_long_pasts_are_attended_to_like_short_ones(isa, family, kv_cache):
    """Many blocks of keys, some of them hidden as a whole; few queries share them out in parts."""
    model = packed(family, activation_levels=None)  # no code tips over
    ids = torch.randint(3, 250, (2, 1200))
    mask = torch.ones_like(ids)
    mask[0, :150] = mask[1, 700:840] = 0
    mask = mask.bool()
    with torch.no_grad():
        use_native(model, False)
        expected = model(ids, attention_mask=mask).logits
        use_native(model, kv_cache=kv_cache)
        cache, steps, end = DynamicCache(config=model.config), [], 0
        for part in ids.split([1100, 93, 5, 1, 1], dim=1):
            end += part.shape[1]
            call = {CACHE_NAME: cache, "attention_mask": mask[:, :end]}
            steps.append(model(part, **call, use_cache=True).logits)
    assert cache.get_seq_length() == 1200
    got = torch.cat(steps, 1)
    if kv_cache == "float32":
        assert_equal(got[mask], expected[mask], tipped=1e-4)
    else:
        assert float((got - expected)[mask].norm() / expected[mask].norm()) < 0.05


def test_long_prompts_go_in_pieces(best, monkeypatch):
    model = packed()
    ids = torch.randint(3, 250, (2, 67))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    kwargs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        whole = model(ids, **kwargs).logits
        monkeypatch.setattr("maqd_hf.kernels.decoder.MAX_TOKENS", 32)
        assert_equal(model(ids, **kwargs).logits[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize("family", ["llama", "one slides", "gpt2", "opt"])
def test_own_forward_and_native_share_a_cache(best, family):
    model = packed(family)
    ids = torch.randint(3, 250, (2, 12))
    with torch.no_grad():
        whole = model(ids).logits[:, -1]
        for native_first in (True, False):
            cache = DynamicCache(config=model.config)
            for part, turn in zip(ids.split(4, dim=1), range(3), strict=True):
                use_native(model, (turn % 2 == 0) == native_first)
                last = model(part, **{CACHE_NAME: cache}, use_cache=True).logits[:, -1]
            use_native(model)
            assert_equal(last, whole)


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION.keys())
@pytest.mark.parametrize("family", ["llama", "one slides", "gpt2", "opt"])
def test_generate_writes_what_the_own_forward_writes(best, family, options):
    looks_up = "prompt_lookup_num_tokens" in options
    if (
        looks_up
        and family == "one slides"
        and not hasattr(DynamicSlidingWindowLayer, "activate_past_recording")
    ):
        pytest.skip("this transformers version crops no sliding windows")
    model = packed(family, embedding_levels=255)
    batch = 1 if looks_up else 2
    ids = torch.randint(3, 250, (1, 4)).repeat(batch, 4)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :3] = 0
    texts = []
    for enabled in (True, False):
        use_native(model, enabled)
        torch.manual_seed(1)
        settings = {"max_new_tokens": 12, "do_sample": False} | options
        texts.append(model.generate(ids, attention_mask=mask, **settings))
    assert torch.equal(*texts)


def test_an_assistant_changes_no_token(best):
    model, assistant = packed(), packed(weight_levels=8)
    ids = torch.randint(3, 250, (1, 9))
    plain = model.generate(ids, max_new_tokens=20, do_sample=False)
    text = model.generate(ids, max_new_tokens=20, do_sample=False, assistant_model=assistant)
    assert torch.equal(plain, text)


def test_which_calls_are_left_to_the_model(best, caplog):
    model = packed()
    ids = torch.randint(3, 250, (1, 5))
    with torch.no_grad():
        assert len(model(ids, output_hidden_states=True).hidden_states) == 3
        assert model(ids, labels=ids).loss > 0
        assert isinstance(model(ids, return_dict=False), tuple)
        mask = torch.ones(1, 1, 5, 5).tril().log()
        assert_equal(model(ids, attention_mask=mask).logits, model(ids).logits)
        static = StaticCache(config=model.config, max_cache_len=8)
        assert_equal(model(ids, **{CACHE_NAME: static}).logits, model(ids).logits)
        assert model(ids, logits_to_keep=2).logits.shape == (1, 2, 259)
        keep = model(ids, logits_to_keep=torch.tensor([0, 3])).logits
        assert_equal(keep, model(ids).logits[:, [0, 3]])
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
        assert CACHE_NAME not in model(ids, use_cache=False)
    with pytest.raises(ValueError, match="specify exactly one"):
        model(input_ids=ids, inputs_embeds=embeds)
    assert model(ids).logits.shape == (1, 5, 259)  # with gradients switched on


def test_which_models_are_not_supported(best):
    model = packed(group_size=2)
    assert "groups of 2" in problem_after_call(model)
    model = packed()
    model.model.layers[0].mlp.register_forward_hook(lambda *args: None)
    assert "model.layers.0.mlp" in unsupported(model)
    with pytest.raises(ValueError, match="hooks"):
        use_native(model)
    model = packed("one slides")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert unsupported(model) == "attention of type chunked_attention"
    model = packed()
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp)
    assert "a llama of another build" in problem_after_call(model)


def test_what_is_unsupported_is_not_looked_into_at_every_token(best, monkeypatch):
    model, checks = packed(group_size=4), []
    make = maqd_hf.decoding.forward.make_plan
    monkeypatch.setattr(
        "maqd_hf.decoding.forward.make_plan", lambda model: checks.append(model) or make(model)
    )
    model.generate(torch.randint(3, 250, (1, 4)), max_new_tokens=6, do_sample=False)
    assert len(checks) == 1


def problem_after_call(model):
    with torch.no_grad():
        model(torch.randint(3, 250, (1, 4)))
    return model.forward.problem


def test_copies_answer_alike_and_changed_tensors_are_seen(best):
    model = packed()
    ids = torch.randint(3, 250, (1, 8))
    with torch.no_grad():
        before = model(ids).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert twin.forward.model is twin
            assert torch.equal(twin(ids).logits, before)
        model.model.layers[1].mlp.down_proj.weight_scale.mul_(3)
        got, expected = both(model, ids)
        assert not torch.allclose(got.logits, before, rtol=0.1)
        assert_equal(got.logits, expected.logits)


def test_a_reloaded_model_answers_like_the_saved_one(best, tmp_path):
    model = packed()
    ids = torch.randint(3, 250, (1, 8))
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.forward, NativeForward)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        half = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        got, expected = both(half, ids)
        assert got.logits.dtype == expected.logits.dtype == torch.bfloat16
        assert torch.allclose(got.logits.float(), model(ids).logits, rtol=0.1, atol=0.1)
    plain = maqd_hf.dequantize_model(loaded)
    assert not plain and "forward" not in loaded.__dict__


def test_compile_and_export_take_the_models_own_forward(best):
    model = packed()
    ids = torch.randint(3, 250, (1, 8))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        run = torch.compile(model, fullgraph=True, backend="eager")
        assert_equal(run(ids, use_cache=False).logits, expected)
        program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False})
        assert_equal(program.module()(input_ids=ids, use_cache=False).logits, expected)


def test_bad_shapes_are_refused_before_memory_is_touched(best):
    model = packed()
    with torch.no_grad():
        model(torch.randint(3, 250, (1, 4)))
    decoder = model.forward.decoder
    store = decoder.store(1)
    hidden, positions = torch.zeros(1, 4, 64), torch.zeros(1, 4).long()
    for bad in [
        (hidden[..., :63], positions, store),
        (hidden, positions[:, :3], store),
        (hidden.repeat(2, 1, 1), positions, store),
        (hidden, positions, store, torch.zeros(1, 3).bool()),
        (hidden, positions, store, None, torch.ones(1, 5).bool()),
    ]:
        with pytest.raises(ValueError, match=r"must be|want"):
            decoder(*bad)
    assert decoder(hidden[:, :0], positions[:, :0], store).shape == (1, 0, 64)
    assert store.lengths == [0, 0]


def test_a_table_is_read_within_its_bounds(best):
    table = packed(embedding_levels=255).get_input_embeddings()
    ids = torch.tensor([[0, 258], [7, 7]])
    got = table(ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAQD_KERNEL", "reference")
        assert torch.allclose(got, table(ids), atol=1e-7)
    assert table(ids[:0]).shape == (0, 2, 64)
    with pytest.raises(IndexError, match="259"):
        table(torch.tensor([259]))


def test_threads_forks_and_two_models(best):
    """Several callers at once; a forked child, where OpenMP has no threads, runs on one."""
    first, second = packed(embedding_levels=255), packed(weight_levels=4)
    ids = torch.randint(3, 250, (1, 40))
    torch.set_num_threads(4)
    try:
        with torch.no_grad():
            expected = first(ids).logits, second(ids).logits
        results = {}

        def run(name, model):
            with torch.no_grad():
                results[name] = [model(ids).logits for _ in range(10)]

        threads = [threading.Thread(target=run, args=(i, (first, second)[i % 2])) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, logits in results.items():
            for one in logits:
                assert_equal(one, expected[name % 2])
        child = os.fork()
        if child == 0:
            with torch.no_grad():
                same = torch.allclose(first(ids).logits, expected[0], rtol=0.1, atol=0.1)
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(1)
