"""maqd_hf.calibration.reconstruct_blocks: laws of block-wise training; its experiment script."""

import copy
import json
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from maqd_hf import quantize_model
from maqd_hf.calibration import calibrate
from maqd_hf.calibration.blockwise import BlockwiseReport, reconstruct_blocks
from maqd_hf.calibration.blockwise import training as module
from maqd_hf.nn import LinearSpec, MaQDLinear
from tests.support.families import example, tiny

WEIGHTS_ONLY = {"activation_levels": None, "layer_batch_norm": False}
STATIC = {"activation_levels": 255, "layer_batch_norm": False}


@pytest.fixture
def ids() -> torch.Tensor:
    """(32, 32) token ids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 200, (32, 32), generator=generator)


def student(teacher: nn.Module, data: object, **config: object) -> nn.Module:
    """A calibrated quantized copy, without what random tokens leave little to gain after."""
    model = copy.deepcopy(teacher)
    quantize_model(model, **{"weight_levels": 4, **WEIGHTS_ONLY, **config})
    calibrate(model, data, gptq_weights=False, smoothing=False, progress=False)
    return model.eval()


def reconstruct(
    model: nn.Module, teacher: nn.Module, data: object, **settings: object
) -> BlockwiseReport:
    settings = {"batch_size": 8, "learning_rate": 0.01, **settings}
    return reconstruct_blocks(model, teacher, data, progress=False, **settings)


def distance(model: nn.Module, teacher: nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    """Squared distance of the last hidden states after the first token, relative to the float's."""
    with torch.no_grad():
        ours, theirs = (
            m(**inputs, output_hidden_states=True).hidden_states[-1][:, 1:]
            for m in (model, teacher)
        )
    return float((ours - theirs).square().sum() / theirs.square().sum())


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------------------------- what it is for


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
@pytest.mark.parametrize("config", [WEIGHTS_ONLY, STATIC])
def test_every_block_and_the_whole_come_closer_to_the_float_model(family, config, ids, request):
    teacher = request.getfixturevalue(family)
    model = student(teacher, ids, **config)
    before = distance(model, teacher, {"input_ids": ids})
    report = reconstruct(model, teacher, ids, epochs=6)
    assert len(report.blocks) == 2
    for result in report.blocks.values():
        assert result.kept
        assert result.after < 0.95 * result.before
    assert distance(model, teacher, {"input_ids": ids}) < 0.95 * before


@pytest.mark.parametrize("settings", [{"correction": 0.0}, {"correction": 0.5}])
def test_other_targets_are_reached_too(settings, tiny_llama, ids):
    model = student(tiny_llama, ids)
    report = reconstruct(model, tiny_llama, ids, epochs=6, **settings)
    assert all(r.after < 0.95 * r.before for r in report.blocks.values())


def test_a_bfloat16_model_has_float32_latents_that_train(tiny_llama, ids):
    tiny_llama.to(torch.bfloat16)
    model = student(tiny_llama, ids)
    report = reconstruct(model, tiny_llama, ids, epochs=6)
    assert all(result.kept for result in report.blocks.values())
    assert model(ids).logits.dtype == torch.bfloat16


def test_the_local_target_of_a_float_block_is_its_own_output(tiny_llama, ids):
    model = student(tiny_llama, ids)
    local = reconstruct(copy.deepcopy(model), tiny_llama, ids, correction=0.0, learning_rate=0.0)
    whole = reconstruct(copy.deepcopy(model), tiny_llama, ids, correction=1.0, learning_rate=0.0)
    (first, second), (same, inherited) = local.blocks.values(), whole.blocks.values()
    assert first == same  # the first block's inputs are float
    assert second.before < inherited.before


def test_only_the_parameters_of_the_blocks_are_trained(tiny_llama, ids):
    model = student(tiny_llama, ids, **STATIC)
    before = state_of(model)
    report = reconstruct(model, tiny_llama, ids, epochs=6)
    assert all(result.kept for result in report.blocks.values())
    changed = {
        name for name, tensor in model.state_dict().items() if (tensor != before[name]).any()
    }
    layers = {n for n, m in model.named_modules() if isinstance(m, MaQDLinear) and "layers" in n}
    learned = ("weight", "weight_log_scale", "weight_offset", "activation.log_step")
    norms = {n for n, m in model.named_modules() if n.endswith("layernorm")}
    expected = {f"{layer}.{name}" for layer in layers for name in learned}
    assert changed == expected | {f"{norm}.weight" for norm in norms}


def test_a_block_that_does_not_get_better_stays_as_it_was(tiny_llama, ids):
    model = student(tiny_llama, ids)
    before = state_of(model)
    report = reconstruct(model, tiny_llama, ids, learning_rate=30.0)
    assert [(r.kept, r.after == r.before) for r in report.blocks.values()] == [(False, True)] * 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "as they were: model.layers.0, model.layers.1" in str(report)


def test_training_leaves_modes_gradients_and_hooks_alone(tiny_llama, ids):
    model = student(tiny_llama, ids).train()
    reconstruct(model, tiny_llama, ids)
    assert model.training and not tiny_llama.training
    assert all(p.grad is None for p in [*model.parameters(), *tiny_llama.parameters()])
    assert not any(m._forward_hooks for m in tiny_llama.modules())
    assert not any(m._forward_pre_hooks for m in tiny_llama.modules())


def test_gradients_exist_for_one_block_at_a_time(tiny_llama, ids, monkeypatch):
    model = student(tiny_llama, ids)
    names: set[frozenset[str]] = set()

    class Watched(torch.optim.AdamW):
        def step(self, *args: object) -> None:
            alive = {
                n.rpartition("layers.")[2][0]
                for n, p in model.named_parameters()
                if p.grad is not None
            }
            names.add(frozenset(alive))
            super().step(*args)

    monkeypatch.setattr(module.torch.optim, "AdamW", Watched)
    reconstruct(model, tiny_llama, ids)
    assert names == {frozenset("0"), frozenset("1")}


def test_unit_rows_change_neither_output_nor_latents(tiny_llama, ids):
    model = student(tiny_llama, ids)
    block = model.model.layers[0]
    layer = block.mlp.down_proj
    latent, weight = layer.weight.detach().clone(), layer.quantized_weight().detach()
    with torch.no_grad(), module.unit_rows(block, {id(p) for p in block.parameters()}):
        torch.testing.assert_close(layer.weight.mean(1), torch.zeros(64), atol=1e-6, rtol=0)
        torch.testing.assert_close(layer.weight.std(1, correction=0), torch.ones(64))
        assert torch.equal(layer.quantized_weight(), weight)
    torch.testing.assert_close(layer.weight.detach(), latent, atol=1e-7, rtol=1e-6)


# -------------------------------------------------------------------------------- what counts


def test_padding_and_first_tokens_do_not_count(tiny_llama, ids):
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    batches = [
        {"input_ids": i[None], "attention_mask": m[None]} for i, m in zip(ids, mask, strict=True)
    ]
    model = student(tiny_llama, batches)
    report = reconstruct(copy.deepcopy(model), tiny_llama, batches)
    for batch in batches:
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][:, 20:] = 7
    assert reconstruct(copy.deepcopy(model), tiny_llama, batches) == report

    weights = module.token_weights(torch.randn(1, 32, 4), batches[0], settings())
    assert weights[0].tolist() == [0.0] + [1.0] * 19 + [0.0] * 12
    weights = module.token_weights(torch.randn(1, 32, 4), batches[0], settings(skip_first=False))
    assert weights[0, 0] == 1


def settings(**changes: object) -> module.BlockSettings:
    values = dict(
        learning_rate=None,
        scale_learning_rate=1e-4,
        epochs=2,
        gradient_clip=0.3,
        correction=1.0,
        relative_tokens=False,
        skip_first=True,
        autocast=False,
        seed=0,
    )
    return module.BlockSettings(**{**values, **changes})


def test_relative_tokens_count_all_tokens_alike():
    target = torch.randn(2, 5, 8) * torch.tensor([1.0, 10, 100, 0.1, 1]).view(1, 5, 1)
    weights = module.token_weights(target, {}, settings(relative_tokens=True))
    torch.testing.assert_close(weights * target.square().sum(-1), torch.ones(2, 5))


# -------------------------------------------------------------------------------------- resuming


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tiny_llama, ids, tmp_path, monkeypatch):
    model = student(tiny_llama, ids)
    whole = copy.deepcopy(model)
    expected = reconstruct(whole, tiny_llama, ids)

    train, trained = module.BlockTraining.train, []

    def killed_in_the_second_block(self: module.BlockTraining, *args: object) -> None:
        trained.append(self)
        train(self, *args)
        if len(trained) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module.BlockTraining, "train", killed_in_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(copy.deepcopy(model), tiny_llama, ids, folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.layers.0.safetensors"]

    resumed = copy.deepcopy(model)
    assert reconstruct(resumed, tiny_llama, ids, folder=tmp_path) == expected
    assert len(trained) == 3  # only the second block once more
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert len(load_file(tmp_path / "model.layers.1.safetensors")) == 3 * 7 + 2  # and two norms


def test_a_folder_of_another_run_is_refused(tiny_llama, ids, tmp_path):
    model = student(tiny_llama, ids)
    reconstruct(copy.deepcopy(model), tiny_llama, ids, folder=tmp_path)
    with pytest.raises(ValueError, match="another folder"):
        reconstruct(copy.deepcopy(model), tiny_llama, ids, epochs=3, folder=tmp_path)
    with pytest.raises(ValueError, match="another folder"):
        reconstruct(copy.deepcopy(model), tiny_llama, ids + 1, folder=tmp_path)


# --------------------------------------------------------------------------- unusual models, errors


def test_a_block_called_twice_is_trained_at_its_first_call(tiny_llama, ids):
    model = student(tiny_llama, ids)
    for llama in (model, tiny_llama):
        llama.model.layers[1] = llama.model.layers[0]
    report = reconstruct(model, tiny_llama, ids, epochs=6)
    ((name, result),) = report.blocks.items()
    assert report.repeated == [name] and name in str(report)
    assert result.kept


def test_parameters_used_elsewhere_too_are_left_alone(tiny_llama, ids):
    model = student(tiny_llama, ids)
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    before = first.weight.detach().clone()
    report = reconstruct(model, tiny_llama, ids)
    assert report.tied == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    assert torch.equal(first.weight, before)
    assert "left alone" in str(report)


@pytest.mark.parametrize("family", ["mixtral", "vit", "gemma3", "t5-encoder"])
def test_other_families_do_not_get_worse(family):
    teacher = tiny(family)
    data = [example(teacher) for _ in range(4)]
    model = student(teacher, data)
    report = reconstruct(model, teacher, data)
    assert len(report.blocks) == 2
    assert all(result.after <= result.before for result in report.blocks.values())
    assert any(result.kept for result in report.blocks.values())


def test_encoder_and_decoder_are_two_walks(ids):
    size = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    teacher = T5(T5Config(**size, vocab_size=200, decoder_start_token_id=0, pad_token_id=0)).eval()
    model = copy.deepcopy(teacher)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "Attention" in name:  # quantize_model refuses T5
            parent, _, leaf = name.rpartition(".")
            layer = MaQDLinear.from_linear(linear, LinearSpec(4, None))
            setattr(model.get_submodule(parent), leaf, layer)
    batches = [{"input_ids": i[:, :12], "decoder_input_ids": i[:, 12:]} for i in ids.split(8)]
    report = reconstruct(model, teacher, batches)
    assert list(report.blocks) == [f"{s}.block.{i}" for s in ("encoder", "decoder") for i in (0, 1)]
    assert all(result.after < result.before for result in report.blocks.values())


def test_what_does_not_fit_is_refused(tiny_llama, tiny_gpt2, ids):
    model = student(tiny_llama, ids)
    with pytest.raises(ValueError, match="quantize_model first"):
        reconstruct(tiny_llama, tiny_llama, ids)
    with pytest.raises(ValueError, match="teacher is quantized"):
        reconstruct(model, copy.deepcopy(model), ids)
    with pytest.raises(ValueError, match=r"no model\.layers\.0"):
        reconstruct(model, tiny_gpt2, ids)
    with pytest.raises(ValueError, match="same dtype"):
        reconstruct(model, copy.deepcopy(tiny_llama).double(), ids)
    sharing = copy.deepcopy(tiny_llama)
    sharing.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ValueError, match="shares trainable"):
        reconstruct(model, sharing, ids)
    config = copy.deepcopy(tiny_llama.config)
    other = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match="_attn_implementation='eager'"):
        reconstruct(model, other, ids)
    with pytest.raises(ValueError, match="epochs=0"):
        reconstruct(model, tiny_llama, ids, epochs=0)
    with pytest.raises(ValueError, match="correction=2"):
        reconstruct(model, tiny_llama, ids, correction=2)
    with pytest.raises(ValueError, match="gradient_clip=0"):
        reconstruct(model, tiny_llama, ids, gradient_clip=0)


def test_activation_steps_must_be_known(tiny_llama, ids):
    model = copy.deepcopy(tiny_llama)
    quantize_model(model, weight_levels=4, activation_levels=255)
    with pytest.raises(ValueError, match="calibrate_activations first"):
        reconstruct(model, tiny_llama, ids)


def test_a_broken_block_is_named(tiny_llama, ids):
    model = student(tiny_llama, ids)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight_log_scale.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"model\.layers\.1: its output error is nan"):
        reconstruct(model, tiny_llama, ids)


# ------------------------------------------------------------------------------------ the script


def test_the_experiments_run_and_are_not_repeated(
    tiny_llama, byte_tokenizer, sample_text, tmp_path, capsys, monkeypatch
):
    script = import_module("scripts.experiments.blockwise")
    tiny_llama.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(sample_text[:20_000], "utf-8")
    arguments = script.Arguments(
        model=str(tmp_path / "model"),
        text=str(tmp_path / "text.txt"),
        output=tmp_path / "results" / "blockwise.json",
        rows=["half*", "end to end alone"],
        samples=4,
        sample_tokens=32,
        tokens=512,
    )
    runs = script.main(arguments)
    assert [run["name"] for run in runs] == ["end to end alone", "half block-wise, then end to end"]
    assert "block-wise" not in runs[0]
    assert all(
        isinstance(runs[1][k], float) for k in ("float", "start", "block-wise", "end to end")
    )
    assert runs == json.loads(arguments.output.read_text("utf-8"))
    assert script.main(arguments) == runs
    assert "end to end alone" in capsys.readouterr().out
