"""Which calls the library answers: a closed list, and every other gives what the model's own
forward gives. Numbers of a model that contradict each other are refused before the library sees
one."""

import threading
from functools import partial

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from maqd_hf import MaQDConfig, pack_model, quantize_model, use_native
from maqd_hf.calibration import calibrate_activations
from maqd_hf.decoding.forward import CACHE_NAME, NativeForward, unsupported
from maqd_hf.kernels import native
from maqd_hf.nn import PackedLinear
from tests.support.decoders import SIZES, packed

IDS = torch.arange(3, 3 + 16).view(2, 8)
LOWEST = torch.finfo(torch.float32).min
CAUSAL = torch.ones(8, 8, dtype=torch.bool).tril()[None, None].expand(2, 1, 8, 8)
PADDED = torch.ones(2, 8, dtype=torch.long)
PADDED[0, :3] = 0
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])


def biased(low):
    return torch.zeros(2, 1, 8, 8).masked_fill(~CAUSAL, low)


FORMS = {
    "ids": {},
    "no cache": {"use_cache": False},
    "integers of 32 bits": {"input_ids": IDS.int()},
    "padding": {"attention_mask": PADDED, "position_ids": (PADDED.cumsum(1) - 1).clamp(min=0)},
    "padding without positions": {"attention_mask": PADDED},
    "a float mask of padding": {"attention_mask": PADDED * 0.5},
    "documents": {"position_ids": PACKED, "use_cache": False},
    "documents with a cache": {"position_ids": PACKED},
    "documents with a mask": {
        "position_ids": PACKED,
        "attention_mask": torch.ones_like(IDS),
        "use_cache": False,
    },
    "positions between the whole ones": {"position_ids": torch.arange(8)[None] * 0.5},
    "positions far on": {"position_ids": torch.arange(8)[None] + 100},
    "positions of one dimension": {"position_ids": torch.arange(8)},
    "negative positions": {"position_ids": torch.arange(8)[None] - 3},
    "positions for one more sequence": {"position_ids": torch.arange(8).expand(3, 8)},
    "a causal mask": {"attention_mask": CAUSAL},
    "a lowest bias": {"attention_mask": biased(LOWEST)},
    "an infinite bias": {"attention_mask": biased(-torch.inf)},
    "a finite bias": {"attention_mask": biased(-2.0)},
    "a large finite bias": {"attention_mask": biased(-1e9)},
    "a mask that looks ahead": {"attention_mask": torch.ones(2, 1, 8, 8, dtype=torch.bool)},
    "a mask of too many positions": {"attention_mask": torch.ones(2, 9, dtype=torch.long)},
    "hidden states": {"output_hidden_states": True},
    "no hidden states": {"output_hidden_states": False},
    "bidirectional": {"is_causal": False},
    "the last logits": {"logits_to_keep": 1},
    "three logits": {"logits_to_keep": 3},
    "more logits than tokens": {"logits_to_keep": 20},
    "some logits": {"logits_to_keep": torch.tensor([5, 0])},
    "a mask of logits": {"logits_to_keep": IDS > 6},
    "a tuple": {"return_dict": False},
    "ids of one dimension": {"input_ids": IDS[0]},
    "no tokens": {"input_ids": IDS[:, :0]},
    "embeddings": {"input_ids": None, "inputs_embeds": torch.randn(2, 8, 64)},
    "embeddings of 64 bits": {"input_ids": None, "inputs_embeds": torch.randn(2, 8, 64).double()},
    "embeddings too narrow": {"input_ids": None, "inputs_embeds": torch.randn(2, 8, 63)},
    "both": {"inputs_embeds": torch.randn(2, 8, 64)},
    "nothing": {"input_ids": None},
    "ids outside the table": {"input_ids": IDS + 300},
}
FAMILIES = ("llama", "sliding", "one slides", "smollm3", "gpt2", "opt")


def outcome(forward, **given):
    try:
        with torch.no_grad():
            found = forward(**given)
        return found[0] if isinstance(found, tuple) else found.logits
    except Exception as error:
        return type(error)


def own(model):
    return partial(type(model).forward, model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_a_call_gives_what_the_models_own_forward_gives(best, family):
    model = packed(family, activation_levels=None)
    native_calls = 0
    for name, given in FORMS.items():
        given = {"input_ids": IDS} | given
        given = {key: value for key, value in given.items() if value is not None}
        got = outcome(model, **given)
        expected = outcome(own(model), **given)
        if isinstance(expected, type):
            assert got is expected, name
            continue
        assert not isinstance(got, type), (name, got)
        assert got.shape == expected.shape, name
        shown = given["attention_mask"] != 0 if "padding" in name else slice(None)
        far = (got[shown] - expected[shown]).norm() / expected[shown].norm()
        assert not far > 1e-5 or not got.numel(), (name, far)
        native_calls += not torch.equal(got, expected)  # the library sums in another order
    assert native_calls >= 5, native_calls


def test_an_error_of_the_model_is_the_callers(best):
    model = packed()
    with torch.no_grad(), pytest.raises(ValueError, match="specify exactly one"):
        model(input_ids=IDS, inputs_embeds=torch.randn(2, 8, 64))


@torch.no_grad()
def test_under_autocast_the_model_answers(best):
    model = packed(activation_levels=None)
    with torch.autocast("cpu", torch.bfloat16):
        got, own = model(IDS).logits, type(model).forward(model, IDS).logits
    assert torch.equal(got, own)
    assert model.forward.problem is None


def forms_of_many_shapes():
    """Arguments of calls on prompts of many shapes, each with a cache, without, and padded."""
    forms = []
    for batch, tokens in [(1, 1), (1, 5), (2, 5), (3, 5), (2, 17), (1, 40), (2, 9), (4, 3)]:
        ids = torch.randint(3, 250, (batch, tokens))
        mask = torch.ones_like(ids)
        mask[0, : tokens // 2] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        forms += [{"input_ids": ids}, {"input_ids": ids, "use_cache": False}]
        forms += [{"input_ids": ids, "attention_mask": mask, "position_ids": positions}]
    return forms


@torch.no_grad()
@pytest.mark.parametrize("scaling", ["token", "static"])
@pytest.mark.parametrize("heads", ["packed", "float"])
def test_any_number_of_threads_gives_what_one_gives(best, scaling, heads):
    """All logits of prompts of many shapes, paddings and cache states, bit for bit."""
    torch.manual_seed(0)
    settings = {"embedding_levels": 255} if heads == "packed" else {}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()
    quantize_model(
        model,
        MaQDConfig(weight_levels=4, activation_scaling=scaling, first_token="own", **settings),
    )
    if scaling == "static":
        calibrate_activations(model, torch.randint(3, 250, (4, 24)), progress=False)
    pack_model(model)
    forms = forms_of_many_shapes()

    def answers(form):
        cache = DynamicCache(config=model.config)
        first = model(**form | ({CACHE_NAME: cache} if "use_cache" not in form else {})).logits
        if "use_cache" in form or "attention_mask" in form:
            return [first]
        step = model(form["input_ids"][:, :1], **{CACHE_NAME: cache}).logits
        return [first, step]

    expected = [answers(form) for form in forms]
    model.forward = NativeForward(model)  # whose plan the threads make
    wrong = []

    def work(start):
        with torch.no_grad():
            for turn in range(2 * len(forms)):
                index = (start + turn * (start + 1)) % len(forms)
                got = answers(forms[index])
                if not all(map(torch.equal, got, expected[index])):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert model.forward.problem is None
    assert not wrong


# ------------------------------------------------------------------- numbers that contradict


def packed_from(model_class, config):
    torch.manual_seed(0)
    model = model_class(config).eval()
    quantize_model(model, MaQDConfig(weight_levels=16, activation_scaling="token"), start="range")
    pack_model(model)
    return model


@pytest.mark.parametrize("kv_heads", [3, 8])
def test_heads_that_do_not_divide_are_refused(best, kv_heads):
    config = LlamaConfig(**SIZES | {"num_key_value_heads": kv_heads})
    model = packed_from(LlamaForCausalLM, config)
    reason = f"4 query heads and {kv_heads} key/value heads of width 16"
    assert reason in unsupported(model)
    with pytest.raises(ValueError, match=reason):
        use_native(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"size of tensor|Number of heads"):
        model(IDS)


@pytest.mark.parametrize("window", [-5, 0])
def test_windows_are_whole_numbers_from_1(best, window):
    model = packed_from(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=window))
    assert f"sliding_window={window}" in unsupported(model)
    got, expected = outcome(model, input_ids=IDS), outcome(own(model), input_ids=IDS)
    assert got is expected or torch.equal(got, expected)


@pytest.mark.parametrize("path", ["self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"])
@pytest.mark.parametrize("rows, columns", [(16, 0), (0, 16)])
def test_layers_of_other_shapes_are_refused(best, path, rows, columns):
    model = packed()
    old = model.model.layers[1].get_submodule(path)
    new = PackedLinear(old.in_features + columns, old.out_features + rows, False, old.spec).eval()
    for parameter in new.parameters():
        parameter.data.zero_()
    model.model.layers[1].set_submodule(path, new)
    name = path.rpartition(".")[2].removesuffix("_proj")
    assert f"the shape of {name} in block 1 is" in unsupported(model)


def test_sums_that_leave_32_bits_are_left_to_the_reference():
    assert native.fits(65_793, 1, 256) and not native.fits(65_794, 1, 256)
    assert native.fits(65_794, 1, 128) and not native.fits(1 << 24, 1, 3)
