"""Laws of saving and loading: what comes back is what was saved, bit for bit."""

from __future__ import annotations

import copy
import inspect
import io
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from maqd_hf import MaQDConfig, pack_model, quantize_model, register
from maqd_hf.checkpoint.version1 import checksum
from maqd_hf.functional import scale_dtype
from maqd_hf.hf_quantizer import _WRAPPERS
from maqd_hf.models.finding import modules_of
from maqd_hf.models.names import Names
from maqd_hf.nn import (
    LayerBatchNorm,
    PackedLinear,
)
from maqd_hf.nn.kinds import OURS
from tests.support.families import (
    DECODERS,
    FAMILIES,
    VOCABULARY,
    example,
    output,
    tiny,
    to_bfloat16,
)

SETTINGS: dict[str, Any] = {"weight_levels": 7, "activation_scaling": "token"}
NO_TOKENS = ("vit", "t5-encoder")  # embeddings of these are not converted


def settings_for(family: str) -> dict[str, Any]:
    return SETTINGS if family in NO_TOKENS else {**SETTINGS, "embedding_levels": 255}


def converted(family: str, state: str, **changes: Any) -> PreTrainedModel:
    model = tiny(family)
    quantize_model(model, **{**settings_for(family), **changes})
    if state == "packed":
        pack_model(model)
    return model


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name].nan_to_num(7.0), second[name].nan_to_num(7.0)), name
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]


@pytest.fixture
def no_uninitialized_memory() -> Iterator[None]:
    """torch fills ``empty`` with NaN, so that a tensor no one filled is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def load(caplog: pytest.LogCaptureFixture) -> Callable[..., Any]:
    """``from_pretrained`` that must not report anything missing, unexpected or mismatched."""

    def load_without_a_word(model_class: Any, path: Path, **kwargs: Any) -> Any:
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        caplog.clear()
        model, info = model_class.from_pretrained(path, output_loading_info=True, **kwargs)
        logger.removeHandler(caplog.handler)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert not [text for text in warnings if "rope_parameters" not in text]  # Gemma in 5.0
        return model

    return load_without_a_word


# ------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("state", ["qat", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_is_what_was_saved(
    family: str,
    state: str,
    sharded: bool,
    tmp_path: Path,
    load: Callable[..., Any],
    no_uninitialized_memory: None,
) -> None:
    model = converted(family, state)
    inputs = example(model)
    before = output(model, inputs)
    model.save_pretrained(tmp_path, max_shard_size="8KB" if sharded else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    again = load(type(model), tmp_path)
    assert_equal(again, model)
    assert torch.equal(output(again, inputs), before)
    assert again.config.quantization_config == model.config.quantization_config
    assert not again.training
    # and once more: a second generation does not drift
    again.save_pretrained(tmp_path / "again")
    assert_equal(load(type(model), tmp_path / "again"), model)


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
@pytest.mark.parametrize("state", ["qat", "packed"])
def test_a_model_loads_by_every_device_map(
    state: str, device_map: str, tmp_path: Path, load: Callable[..., Any]
) -> None:
    model = converted("llama-tied", state)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert_equal(load(type(model), tmp_path, device_map=device_map), model)


@pytest.mark.parametrize("state", ["qat", "packed"])
@pytest.mark.parametrize("family", ["llama-tied", "llama-untied", "gemma3", "bert", "bert-mlm"])
def test_bfloat16_models_keep_our_tensors_in_float32(
    family: str, state: str, tmp_path: Path, load: Callable[..., Any], no_uninitialized_memory: None
) -> None:
    model = to_bfloat16(tiny(family))
    quantize_model(model, **settings_for(family))
    if state == "packed":
        pack_model(model)
    inputs = example(model)
    before = output(model, inputs)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    ours = {f"{n}.{k}" for n, m in modules_of(model, *OURS) for k in m.state_dict()}
    for again in (load(type(model), tmp_path), load(type(model), tmp_path, device_map="auto")):
        assert_equal(again, model)
        for name, tensor in again.state_dict().items():
            if name.endswith("output_like"):
                assert tensor.dtype == torch.bfloat16
            elif tensor.is_floating_point() and not name.endswith("decoder.bias"):
                wanted = torch.float32 if name in ours else torch.bfloat16
                assert tensor.dtype == wanted, name
        assert again.dtype == before.dtype == torch.bfloat16
        assert torch.equal(output(again, inputs), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_asked_for_is_that_of_the_rest(dtype: torch.dtype, tmp_path: Path) -> None:
    model = converted("llama-untied", "packed", embedding_levels=None, exclude=["layers.0.*"])
    model.save_pretrained(tmp_path)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert again.lm_head.weight.dtype == again.model.layers[0].mlp.up_proj.weight.dtype == dtype
    layer = again.model.layers[1].mlp.up_proj
    assert layer.weight.dtype == torch.int32 and layer.weight_scale.dtype == torch.float32
    assert output(again, example(again)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("device_map", [None, "auto"])
def test_scales_of_groups_are_16_bit_in_the_file_and_whatever_dtype_is_asked_for(
    device_map: str | None, dtype: torch.dtype, tmp_path: Path, load: Callable[..., Any]
) -> None:
    model = converted("llama-untied", "packed", group_size=8)
    model.save_pretrained(tmp_path)
    scales = {k: t for k, t in load_file(tmp_path / "model.safetensors").items() if "_scale" in k}
    again = load(type(model), tmp_path, dtype=dtype, device_map=device_map)
    for name, scale in scales.items():
        one_a_row = scale.shape[1] == 1
        assert scale.dtype == (torch.float32 if one_a_row else torch.bfloat16)
        for other in (model, again):
            tensor = other.get_parameter(name)
            assert tensor.dtype == scale.dtype and torch.equal(tensor, scale)
    assert sum(scale.dtype == torch.bfloat16 for scale in scales.values()) == 2 * 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_checkpoint_with_scales_of_groups_in_float32_is_rounded(
    dtype: torch.dtype, tmp_path: Path, load: Callable[..., Any]
) -> None:
    """As all were saved once; their checksums are those of the float32 numbers."""
    model = converted("llama-untied", "packed", group_size=8, activation_levels=None)
    inputs, modules, given = example(model), model.config.quantization_config.modules, {}
    for name, layer in modules_of(model, PackedLinear):
        layer.widen_scale()
        if layer.weight_scale.shape[1] > 1:
            layer.weight_scale.data *= 1 + 1e-3 * torch.randn(layer.weight_scale.shape)
        given[name] = layer.weight_scale.clone()
        modules[Names(model).relative(name)]["crc32"] = checksum(layer)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    again = load(type(model), tmp_path, dtype=dtype)
    for name, layer in modules_of(again, PackedLinear):
        assert torch.equal(layer.weight_scale, given[name].to(scale_dtype(given[name].shape[1])))
    if dtype == torch.float32:
        error = (output(again, inputs) - expected).norm() / expected.norm()
        assert 0 < error < 0.004


@pytest.mark.parametrize("state", ["qat", "packed"])
@pytest.mark.parametrize("family", ["llama-tied", "llama-untied", "gpt2", "opt", "bert-mlm"])
def test_other_heads_on_the_same_base(
    family: str, state: str, tmp_path: Path, no_uninitialized_memory: None
) -> None:
    model = converted(family, state)
    inputs = example(model)
    model.save_pretrained(tmp_path / "head")
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state
    base = hf.AutoModel.from_pretrained(tmp_path / "head")
    assert torch.equal(output(base, inputs), hidden)
    base.save_pretrained(tmp_path / "base")
    again = hf.AutoModel.from_pretrained(tmp_path / "base")
    assert_equal(again, base)
    back = type(model).from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(back.base_model(**inputs).last_hidden_state, hidden)
    if family != "llama-untied" and family != "bert-mlm":
        # a tied head comes back; its input is not quantized, the base never had a step for it
        assert back.get_output_embeddings().spec.activation_levels is None
        table = model.get_input_embeddings()
        weight = table.dequantized_weight() if state == "packed" else table.quantized_weight()
        expected = hidden @ weight.detach().T
        torch.testing.assert_close(output(back, inputs), expected, rtol=1e-4, atol=1e-4)
        back.save_pretrained(tmp_path / "back")
        assert_equal(type(model).from_pretrained(tmp_path / "back"), back)


def test_a_classifier_on_a_packed_base(tmp_path: Path) -> None:
    model = converted("llama-tied", "packed")
    model.save_pretrained(tmp_path)
    classifier = hf.LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert output(classifier, example(model)).shape == (2, 3)
    assert_equal(classifier.model, model.model)


def test_the_config_in_the_checkpoint_says_everything(tmp_path: Path) -> None:
    model = tiny("llama-tied")
    overrides = {"layers.*": {"weight_levels": 4}, "*.v_proj": {"weight_levels": 9}}
    quantize_model(model, **SETTINGS, exclude=["layers.0.mlp.*"], overrides=overrides)
    pack_model(model)
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    config = MaQDConfig.from_dict(content)
    assert config == model.config.quantization_config
    assert list(config.overrides) == list(overrides)
    assert (content["quant_method"], content["state"], content["format_version"]) == (
        "maqd",
        "packed",
        2,
    )
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.model.layers[0].self_attn.v_proj.spec.weight_levels == 9
    assert again.model.layers[0].self_attn.q_proj.spec.weight_levels == 4


def test_qat_models_are_ordinary_models(tmp_path: Path) -> None:
    model = converted("llama-tied", "qat")
    model.save_pretrained(tmp_path)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not getattr(again, "is_quantized", False) and not hasattr(again, "hf_quantizer")
    changed = {k: v + 1 if v.is_floating_point() else v for k, v in again.state_dict().items()}
    again.save_pretrained(tmp_path / "changed", state_dict=changed)
    third = hf.LlamaForCausalLM.from_pretrained(tmp_path / "changed")
    assert torch.equal(third.model.norm.weight, again.model.norm.weight + 1)
    again.float().train()
    inputs = example(again)
    again(**inputs, labels=inputs["input_ids"]).loss.backward()


# --------------------------------------------------------------------------------- on the fly


@pytest.mark.parametrize(
    "kwargs", [{}, {"dtype": torch.bfloat16}, {"device_map": "auto"}], ids=["plain", "bf16", "auto"]
)
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_converting_while_loading_equals_converting_after(
    sharded: bool, kwargs: dict[str, Any], tmp_path: Path, load: Callable[..., Any]
) -> None:
    model = tiny("llama-tied")
    model.save_pretrained(tmp_path, max_shard_size="8KB" if sharded else "5GB")
    config = MaQDConfig(**SETTINGS, embedding_levels=15)
    before = copy.deepcopy(config)
    loaded = load(hf.AutoModelForCausalLM, tmp_path, quantization_config=config, **kwargs)
    expected = hf.AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs)
    quantize_model(expected, config)
    assert_equal(loaded, expected)
    assert loaded.config.quantization_config == expected.config.quantization_config
    assert config == before
    loaded.save_pretrained(tmp_path / "qat")
    assert_equal(load(hf.AutoModelForCausalLM, tmp_path / "qat"), loaded)
    pack_model(loaded)
    assert output(loaded, example(loaded)).isfinite().all()


def test_converting_onto_disk_is_refused(tmp_path: Path) -> None:
    tiny("llama-tied").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="disk, where weights cannot be converted"):
        hf.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=MaQDConfig(), device_map={"": "disk"}
        )


# ------------------------------------------------------------------------- without the package

WITHOUT = """
import sys, torch, transformers
transformers.logging.set_verbosity_error()
assert "maqd_hf" not in sys.modules
for path in sys.argv[1:]:
    try:
        transformers.AutoModelForCausalLM.from_pretrained(path)
    except (RuntimeError, ValueError) as error:
        print(path, "refused", type(error).__name__)
    else:
        print(path, "LOADED")
"""


def test_without_the_package_loading_raises_at_every_bit_width(tmp_path: Path) -> None:
    paths = []
    for levels in (2, 3, 4, 5, 7, 8, 15, 16, 32, 64, 128, 255, 256):
        for embedding in (None, 255):
            model = tiny("llama-tied")
            quantize_model(
                model,
                weight_levels=levels,
                activation_scaling="token",
                embedding_levels=embedding,
                targets=["layers.0.mlp.up_proj"],
            )
            pack_model(model)
            paths.append(tmp_path / f"{levels}-{embedding}")
            model.save_pretrained(paths[-1])
    command = [sys.executable, "-c", WITHOUT, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("refused") == len(paths) and "LOADED" not in result.stdout


# ---------------------------------------------------------------------- copies, casts and moves


@pytest.mark.parametrize("state", ["qat", "packed"])
def test_copies_and_pickles_compute_the_same(state: str) -> None:
    model = converted("llama-tied", state)
    inputs = example(model)
    before = output(model, inputs)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert_equal(other, model)
        assert torch.equal(output(other, inputs), before)
        assert other.lm_head.weight is other.model.embed_tokens.weight
        other.load_state_dict(model.state_dict())


@pytest.mark.parametrize("state", ["qat", "packed"])
def test_casts_reach_the_rest_of_the_model_but_not_our_tensors(state: str, tmp_path: Path) -> None:
    casts: dict[torch.dtype, Callable[[nn.Module], nn.Module]] = {
        torch.float16: lambda m: m.half(),
        torch.bfloat16: lambda m: m.to(torch.bfloat16),
        torch.float32: lambda m: m.float().to("cpu"),
    }
    for dtype, cast in casts.items():
        model = converted("llama-untied", state, exclude=["layers.0.*"])
        ours = {n: copy.deepcopy(m) for n, m in modules_of(model, *OURS)}
        cast(model)
        for name, module in modules_of(model, *OURS):
            for key, tensor in module.state_dict().items():
                if key != "output_like":
                    assert torch.equal(tensor, ours[name].state_dict()[key])
                    assert tensor.dtype == ours[name].state_dict()[key].dtype
        assert model.model.layers[0].mlp.up_proj.weight.dtype == dtype == model.dtype
        before = output(model, example(model))
        assert before.dtype == dtype and before.isfinite().all()
        model.save_pretrained(tmp_path / str(dtype))
        assert_equal(type(model).from_pretrained(tmp_path / str(dtype)), model)


# ------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_generation_is_the_same_packed_and_simulated(family: str, cache: str) -> None:
    simulated = converted(family, "qat", weight_levels=255)
    for _, norm in modules_of(simulated, LayerBatchNorm):
        norm.running_log_ms.fill_(0.1)  # some open gates, with statistics of their own
        norm.batches_seen.fill_(1)
        norm.gate.fill_(float(norm.spec.statistics == "gated"))
    packed = copy.deepcopy(simulated)
    pack_model(packed)
    torch.manual_seed(4)
    for batch in (1, 8):
        ids = torch.randint(2, VOCABULARY, (batch, 6))
        mask = torch.ones_like(ids)
        for row in range(batch):
            mask[row, : row % 4] = 0
        ids = torch.where(mask.bool(), ids, 0)
        kwargs = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
        with torch.no_grad():
            a, b = (
                m.generate(ids, attention_mask=mask, **kwargs, disable_compile=True)
                for m in (simulated, packed)
            )
        assert torch.equal(a, b) and a.shape == (batch, 12)
        if batch == 8:  # each row is what it would have been alone, without padding
            for row in range(4):
                with torch.no_grad():
                    alone = packed.generate(
                        ids[row : row + 1, row:],
                        attention_mask=mask[row : row + 1, row:],
                        **kwargs,
                        disable_compile=True,
                    )
                assert torch.equal(alone[0, -6:], b[row, -6:])


def test_registering_twice_is_harmless() -> None:
    before = AUTO_QUANTIZER_MAPPING["maqd"]
    register()
    assert AUTO_QUANTIZER_MAPPING["maqd"] is before


def test_transformers_can_dequantize(tmp_path: Path) -> None:
    model = converted("llama-tied", "packed", layer_batch_norm=False)
    model.save_pretrained(tmp_path / "packed")
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path / "packed")
    plain = again.dequantize()
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    plain.save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    assert not any("scale" in name or "step" in name for name in tensors)


@pytest.mark.parametrize("packed", [False, True])
def test_loading_keeps_frozen_tensors_frozen(tiny_llama, tmp_path, packed):
    """transformers makes every float tensor it loads trainable; an optimizer would see them."""
    quantize_model(tiny_llama, activation_scaling="token", embedding_levels=255)
    if packed:
        pack_model(tiny_llama)
    tiny_llama.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    trainable = {n for n, p in tiny_llama.named_parameters() if p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == trainable
    assert packed or not any(n.endswith("weight_step") for n in trainable)


@pytest.mark.parametrize("name", _WRAPPERS)
def test_wrapped_methods_take_their_arguments_by_name(name: str) -> None:
    """``load_adapter``, for one, gives all of them by name, for models of any kind."""
    method = inspect.unwrap(getattr(PreTrainedModel, name))
    seen: dict[str, Any] = {}

    @wraps(method)
    def original(*args: Any, **kwargs: Any) -> None:
        seen.update(inspect.signature(method).bind(*args, **kwargs).arguments)

    given = {
        parameter.name: None if parameter.name == "checkpoint_files" else MagicMock()
        for parameter in inspect.signature(method).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    _WRAPPERS[name](original)(**given)
    assert {key: seen[key] for key in given} == given
