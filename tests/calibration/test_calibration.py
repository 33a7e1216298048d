"""maqd_hf.calibration: GPTQ start values, latents that keep their codes, activation steps.

And scripts/quantize_ptq.py, which does nothing else.
"""

import copy
import json
from importlib import import_module

import pytest
import torch
from torch import nn
from transformers import BertForMaskedLM, GPT2LMHeadModel, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from maqd_hf import quantize_model
from maqd_hf.calibration import (
    best_step,
    blocks,
    calibrate,
    calibrate_activations,
    compensation,
    gptq,
    smooth,
)
from maqd_hf.calibration.blocks import as_batches, counted_tokens, find_segments
from maqd_hf.calibration.compensation import (
    Grid,
    Hessian,
    InputMoments,
    compensate,
    descend,
    fit_scales,
    latent_for_codes,
    output_error,
    set_codes,
)
from maqd_hf.functional import dequantize, grid_center, quantize, stored_scale
from maqd_hf.nn import ActivationQuantizer, LinearSpec, MaQDLinear
from maqd_hf.nn.precision import fast_bf16
from maqd_hf.nn.step_search import search_step

gptq_module = import_module(gptq.__module__)  # its name is the function's, too
LEVELS = (2, 3, 4, 8, 15, 16, 255)
WEIGHTS_ONLY = {"activation_levels": None, "layer_batch_norm": False}


@pytest.fixture
def ids() -> torch.Tensor:
    """(8, 32) token ids with structure: no token is likelier than its neighbours by chance."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 200, (8, 32), generator=generator)


@pytest.fixture
def inputs() -> torch.Tensor:
    """(600, 64) strongly correlated inputs."""
    torch.manual_seed(2)
    return torch.randn(600, 64) @ torch.randn(64, 64) * torch.rand(64)


def moments_of(x: torch.Tensor) -> InputMoments:
    moments = InputMoments(x.shape[1])
    moments.add(x)
    return moments


def layers_of(model: nn.Module) -> dict[str, MaQDLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, MaQDLinear)}


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def searched_grid(weight: torch.Tensor, levels: int, groups: int) -> Grid:
    center = weight.mean(1, keepdim=True)
    step = search_step((weight - center).view(len(weight), groups, -1), levels)
    return Grid(stored_scale(step), center, levels)


def squared_output_error(layer: MaQDLinear, weight: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (layer.quantized_weight() - weight).t()).detach().square().sum())


# ------------------------------------------------------------------------------- one matrix


def test_moments_do_not_depend_on_the_batches(inputs):
    whole, parts = moments_of(inputs), InputMoments(64)
    for part in inputs.split(77):
        parts.add(part, part + 1)
    torch.testing.assert_close(parts.second, whole.second)
    torch.testing.assert_close(whole.second, inputs.t() @ inputs / len(inputs))
    torch.testing.assert_close(parts.drift, inputs.mean(0).expand(64, 64), atol=1e-4, rtol=1e-4)


def test_hessian_factor_is_the_inverse_and_nan_raises(inputs):
    hessian = Hessian.of(moments_of(inputs).second, damp=0.01, act_order=True)
    ordered = hessian.matrix[hessian.order][:, hessian.order].double()
    u = hessian.factor.double()
    torch.testing.assert_close(u.t() @ u @ ordered, torch.eye(64).double(), atol=1e-3, rtol=0)
    assert bool((ordered.diagonal().diff() <= 0).all())
    rows = torch.randn(5, 64)
    torch.testing.assert_close(hessian.solve(rows) @ hessian.matrix, rows, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="NaN"):
        Hessian.of(torch.full((4, 4), float("nan")), 0.01, False)


def test_shrinking_divides_every_correlation_by_the_same(inputs, monkeypatch):
    monkeypatch.setattr(compensation, "_MEAN_WEIGHT", 0.0)  # comes after it
    second = moments_of(inputs).second
    plain, shrunk = (Hessian.of(second, 1e-6, False, shrink).matrix for shrink in (0.0, 0.25))
    apart = ~torch.eye(len(second), dtype=torch.bool)
    torch.testing.assert_close(shrunk[apart], plain[apart])
    torch.testing.assert_close(shrunk.diagonal(), 1.25 * plain.diagonal())


def test_a_rank_deficient_moment_is_damped_until_it_works(inputs, caplog):
    second = moments_of(inputs[:10]).second  # rank 10 of 64
    hessian = Hessian.of(second, damp=0.0, act_order=False)
    assert bool(hessian.factor.isfinite().all())
    assert "rank-deficient" in caplog.text


def test_compensation_without_correlation_is_rounding():
    torch.manual_seed(0)
    weight = torch.randn(6, 32)
    grid = searched_grid(weight, 8, 2)
    hessian = Hessian(torch.eye(32), torch.arange(32), torch.eye(32))
    codes, rounded = compensate(weight, grid, hessian, block_size=8)
    assert torch.equal(codes, grid.codes(weight))
    torch.testing.assert_close(rounded, weight)


@pytest.mark.parametrize("act_order", [False, True])
def test_compensation_does_not_depend_on_the_block_size(inputs, act_order):
    weight = torch.randn(12, 64)
    grid = searched_grid(weight, 16, 2)
    hessian = Hessian.of(moments_of(inputs).second, 0.01, act_order)
    whole, _ = compensate(weight, grid, hessian, 64)
    parts, _ = compensate(weight, grid, hessian, 7)
    assert float((whole == parts).float().mean()) > 0.99  # a tie may round the other way


def test_compensate_equals_optimal_brain_quantization(inputs):
    """Slow reference: after each rounded column, the best real values of all later ones."""
    weight = torch.randn(4, 64).double()
    grid = searched_grid(weight.float(), 8, 1)
    second = moments_of(inputs).second
    hessian = Hessian.of(second, 0.01, act_order=False)
    h, w = hessian.matrix.double(), weight.clone()
    expected = torch.empty_like(w)
    for j in range(64):
        code = quantize(w[:, j : j + 1] - grid.center, 8, grid.step)
        value = dequantize(code, 8, grid.step) + grid.center
        expected[:, j : j + 1] = code
        gap = w[:, j : j + 1] - value
        if j < 63:  # minimise the error over columns j+1.. given the gap in column j
            w[:, j + 1 :] += torch.linalg.solve(
                h[j + 1 :, j + 1 :], h[j + 1 :, j : j + 1] @ gap.T
            ).T
    codes, _ = compensate(weight.float(), grid, hessian, 16)
    assert float((codes == expected).double().mean()) > 0.99


@pytest.mark.parametrize("levels", [2, 3, 4, 16])
@pytest.mark.parametrize("groups", [1, 4])
def test_every_stage_lowers_the_output_error(inputs, levels, groups):
    torch.manual_seed(3)
    weight = torch.randn(24, 64)
    second = moments_of(inputs).second
    hessian = Hessian.of(second, 0.01, act_order=True)
    grid = searched_grid(weight, levels, groups)

    def damped_error(codes):
        return output_error(weight, grid.values(codes), hessian.matrix)

    nearest = grid.codes(weight)
    codes, _ = compensate(weight, grid, hessian, 16)
    assert float(damped_error(codes).sum()) < 0.9 * float(damped_error(nearest).sum())
    better, wanted = descend(weight, grid, codes, hessian, 16)
    assert bool((damped_error(better) <= damped_error(codes) * (1 + 1e-4)).all())
    assert torch.equal(grid.codes(wanted), better)
    scale, offset = fit_scales(weight, better, grid, second, offset=True)
    before = output_error(weight, grid.values(better), second)
    after = output_error(weight, Grid(scale, offset, levels).values(better), second)
    assert bool((after <= before * (1 + 1e-4)).all())
    assert bool((scale > 0).all())


def test_fit_scales_recovers_the_scales_that_made_the_weight(inputs):
    torch.manual_seed(4)
    codes = torch.randint(0, 8, (6, 64)).float()
    truth = Grid(torch.rand(6, 4) + 0.5, torch.randn(6, 1), 8)
    start = Grid(torch.ones(6, 4), torch.zeros(6, 1), 8)
    scale, offset = fit_scales(truth.values(codes), codes, start, torch.eye(64), offset=True)
    torch.testing.assert_close(scale, truth.step, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(offset, truth.center, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------- codes -> latent


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("offset", [True, False])
def test_a_layer_reproduces_its_codes_bit_for_bit(inputs, levels, group_size, offset):
    torch.manual_seed(levels)
    weight = torch.randn(32, 64) * torch.rand(32, 1) + 0.3 * torch.randn(32, 1)
    weight[::5, 7] *= 12  # outliers
    spec = LinearSpec(levels, None, group_size=group_size, weight_offset=offset)
    layer = MaQDLinear(64, 32, False, spec)
    grid = searched_grid(weight, levels, spec.groups(64))
    if not offset:
        grid = Grid(grid.step, torch.zeros(32, 1), levels)
    hessian = Hessian.of(moments_of(inputs).second, 0.01, act_order=True)
    codes, wanted = compensate(weight, grid, hessian, 16)
    lost = set_codes(layer, codes, wanted, grid)
    kept = (layer.weight_codes() == codes).all(1)
    assert lost == int((~kept).sum())
    if offset:  # without an offset, a row far from zero has codes on one side only
        assert lost == 0
        torch.testing.assert_close(layer.quantized_weight(), grid.values(codes))
    torch.testing.assert_close(layer.weight.mean(1, keepdim=True)[kept], grid.center[kept])


def test_the_latent_moves_no_more_than_it_must():
    weight = torch.tensor([[-1.5, -0.4, 0.6, 1.5]])  # mean 0.05: each must move by 0.05
    grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), 4)
    latent = latent_for_codes(grid.codes(weight), weight, grid)
    torch.testing.assert_close(latent, weight - 0.05)


def test_rows_without_a_latent_are_counted():
    layer = MaQDLinear(8, 3, False, LinearSpec(4, None))
    codes = torch.randint(0, 4, (3, 8), generator=torch.Generator().manual_seed(0)).float()
    codes[0], codes[1:, :4] = 3, 3 - codes[1:, 4:]
    grid = Grid(torch.ones(3, 1), torch.zeros(3, 1), 4)
    assert set_codes(layer, codes, grid.values(codes), grid) == 1  # all 3: above the mean?
    assert torch.equal(layer.weight_codes()[1:], codes[1:])
    assert bool(layer.weight.isfinite().all())


# ----------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
@pytest.mark.parametrize(("levels", "group_size"), [(16, None), (4, 32)])
def test_gptq_beats_rounding_in_every_layer(request, ids, family, levels, group_size):
    model = request.getfixturevalue(family)
    quantize_model(model, weight_levels=levels, group_size=group_size, **WEIGHTS_ONLY)
    report = gptq(model, ids, progress=False)
    assert set(report.layers) == set(layers_of(model)) - set(report.searched)
    assert len(report.layers) >= 8
    assert report.unseen == []
    for name, result in report.layers.items():
        assert result.error <= result.rounding_error * (1 + 1e-4), name
        assert result.unreachable_rows == 0
    mean = sum(r.error / r.rounding_error for r in report.layers.values()) / len(report.layers)
    assert mean < 0.9
    assert str(len(report.layers)) in str(report)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_the_model_itself_gets_closer_to_the_float_one(request, ids, family):
    model = request.getfixturevalue(family)
    with torch.no_grad():
        wanted = model(ids).logits
    quantize_model(model, weight_levels=4, **WEIGHTS_ONLY)
    with torch.no_grad():
        before = float((model(ids).logits - wanted).square().mean())
        gptq(model, ids, progress=False)
        after = float((model(ids).logits - wanted).square().mean())
    assert after < 0.7 * before


def test_plain_gptq_of_the_first_block_on_its_real_inputs(tiny_llama, ids):
    quantize_model(tiny_llama, weight_levels=4, rotation=None, **WEIGHTS_ONLY)
    rounded = copy.deepcopy(tiny_llama)
    gptq(tiny_llama, ids, correction=0.0, progress=False)
    name = "model.layers.0.self_attn.q_proj"
    layer, other = tiny_llama.get_submodule(name), rounded.get_submodule(name)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 1:].flatten(0, 1)))
    with torch.no_grad():
        tiny_llama(ids)
    float_weight = other.weight
    assert squared_output_error(layer, float_weight, seen[0]) < 0.9 * squared_output_error(
        other, float_weight, seen[0]
    )


def test_it_is_deterministic_and_leaves_the_model_as_it_was_otherwise(tiny_llama, ids):
    quantize_model(tiny_llama, weight_levels=8, activation_levels=255, layer_batch_norm=False)
    tiny_llama.train()
    tiny_llama.model.layers[0].eval()
    twin = copy.deepcopy(tiny_llama)
    hooks_before = hooks_of(twin)
    for model in (tiny_llama, twin):
        gptq(model, ids, progress=False)
    for (name, a), b in zip(
        tiny_llama.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b) or "log_step" in name
    assert tiny_llama.training
    assert not tiny_llama.model.layers[0].training
    assert all(isinstance(m.activation, ActivationQuantizer) for m in layers_of(twin).values())
    assert all(m.weight_step is not None for m in layers_of(twin).values())
    assert hooks_of(twin) == hooks_before
    assert not any("forward" in vars(m) for m in twin.modules())


def test_weights_on_the_grid_stay_there(tiny_llama, ids):
    quantize_model(tiny_llama, weight_levels=16, **WEIGHTS_ONLY)
    layers = layers_of(tiny_llama)
    for layer in layers.values():
        codes = torch.arange(layer.weight.numel()).view_as(layer.weight) * 7 % 16
        with torch.no_grad():
            layer.weight.copy_((codes.float() - 7.5) * 0.01)
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    gptq(tiny_llama, ids, progress=False)
    for name, layer in layers.items():
        torch.testing.assert_close(layer.quantized_weight(), before[name], atol=2e-4, rtol=0)


def test_padding_counts_for_nothing(tiny_bert, ids):
    quantize_model(tiny_bert, weight_levels=4, **WEIGHTS_ONLY)
    twin = copy.deepcopy(tiny_bert)
    mask = torch.ones(8, 40, dtype=torch.long)
    mask[:, 32:] = 0
    padded = torch.nn.functional.pad(ids, (0, 8), value=150)
    a = gptq(tiny_bert, [{"input_ids": ids}], progress=False)
    b = gptq(twin, [{"input_ids": padded, "attention_mask": mask}], progress=False)
    for name, result in a.layers.items():
        assert b.layers[name].rounding_error == pytest.approx(result.rounding_error, rel=2e-2)
    name = next(n for n in a.layers if n.endswith("query"))
    same = tiny_bert.get_submodule(name).weight_codes() == twin.get_submodule(name).weight_codes()
    assert float(same.float().mean()) > 0.99


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_bert"])
@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_one_batch_and_several_give_the_same_model(request, ids, family, correction, monkeypatch):
    monkeypatch.setattr(blocks, "fast_bf16", lambda device: False)
    model = request.getfixturevalue(family)
    quantize_model(model, weight_levels=4, group_size=32, **WEIGHTS_ONLY)
    twin = copy.deepcopy(model)
    one = gptq(model, ids, correction=correction, progress=False)
    several = gptq(twin, ids, correction=correction, batch_size=3, progress=False)
    assert list(one.layers) == list(several.layers)
    same = []
    for name, layer in layers_of(model).items():
        codes = layer.weight_codes(), twin.get_submodule(name).weight_codes()
        same.append(float((codes[0] == codes[1]).float().mean()))
        assert several.layers[name].error == pytest.approx(one.layers[name].error, rel=0.05)
    # Sums in another order: somewhere a code is near a tie and falls on its other side, sooner or
    # later by the processor. From there on the layers meet other inputs.
    assert next((share for share in same if share < 1), 1.0) > 0.98


def test_a_block_runs_once_in_float_and_once_quantized_and_the_head_never(tiny_llama, ids):
    quantize_model(tiny_llama, weight_levels=4, activation_levels=255, layer_batch_norm=False)
    runs = {"mlp.down_proj": [], "lm_head": []}
    tiny_llama.model.layers[1].mlp.down_proj.register_forward_hook(
        lambda module, args, out: runs["mlp.down_proj"].append(len(args[0]))
    )
    tiny_llama.lm_head.register_forward_hook(lambda *_: runs["lm_head"].append(1))
    gptq(tiny_llama, ids, progress=False)
    assert runs == {"mlp.down_proj": [1, 8, 8], "lm_head": []}  # the first to find the blocks
    calibrate_activations(tiny_llama, ids, progress=False)
    assert runs["lm_head"] == []


def test_bfloat16_products_only_where_they_pay(tiny_llama, monkeypatch):
    monkeypatch.setattr(blocks, "fast_bf16", lambda device: True)
    with blocks.bfloat16_products(tiny_llama):
        assert torch.is_autocast_enabled("cpu")
    with blocks.bfloat16_products(tiny_llama.double()):
        assert not torch.is_autocast_enabled("cpu")
    monkeypatch.setattr(blocks, "fast_bf16", lambda device: False)
    with blocks.bfloat16_products(tiny_llama.float()):
        assert not torch.is_autocast_enabled("cpu")
    assert fast_bf16("meta") is False


@pytest.mark.parametrize("fast", [False, True])
def test_moments_and_solvers_stay_float32(tiny_llama, ids, monkeypatch, fast):
    """Only forwards may run in bfloat16: the rest sums over thousands of tokens."""
    monkeypatch.setattr(blocks, "fast_bf16", lambda device: fast)
    inner, seen = gptq_module._quantize_layer, []

    def spy(layer, moments, hessian, settings):
        seen.append(torch.is_autocast_enabled("cpu"))
        x = torch.full((1, 3), 1 + 2**-10)
        add = InputMoments(3)
        add.add(x)
        assert float(add.second[0, 1]) == float(x[0, 0] ** 2)
        return inner(layer, moments, hessian, settings)

    monkeypatch.setattr(gptq_module, "_quantize_layer", spy)
    quantize_model(tiny_llama, weight_levels=16, **WEIGHTS_ONLY)
    gptq(tiny_llama, ids, progress=False)
    assert len(seen) == 14 and not any(seen)


def test_bfloat16_model(tiny_llama, ids):
    tiny_llama.to(torch.bfloat16)
    quantize_model(tiny_llama, weight_levels=4, **WEIGHTS_ONLY)
    report = gptq(tiny_llama, ids, progress=False)
    assert all(r.error <= r.rounding_error for r in report.layers.values())
    assert tiny_llama(ids).logits.dtype == torch.bfloat16


def test_encoder_decoder_is_two_segments(ids):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=200,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    model = T5(config).eval()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "Attention" in name:  # quantize_model refuses T5
            parent, _, leaf = name.rpartition(".")
            setattr(
                model.get_submodule(parent),
                leaf,
                MaQDLinear.from_linear(linear, LinearSpec(4, None)),
            )
    batch = {"input_ids": ids[:, :20], "decoder_input_ids": ids[:, 20:]}
    with torch.no_grad():
        segments = find_segments(model, batch)
    assert [len(s.calls) for s in segments] == [2, 2]
    report = gptq(model, [batch], progress=False)
    assert report.unseen == []
    assert any("decoder" in n and "EncDec" in n for n in report.layers)
    assert all(r.error <= r.rounding_error * (1 + 1e-4) for r in report.layers.values())


def test_unusable_data_and_settings_are_refused(tiny_llama, tiny_gpt2, ids):
    with pytest.raises(ValueError, match="quantize_model first"):
        gptq(tiny_gpt2, ids)
    quantize_model(tiny_llama, weight_levels=4, layer_batch_norm=False)
    for empty in ([], ids[:0], [{}]):
        with pytest.raises(ValueError, match=r"empty|holds"):
            gptq(tiny_llama, empty)
        with pytest.raises(ValueError, match=r"empty|holds"):
            calibrate_activations(tiny_llama, empty)
    with pytest.raises(ValueError, match="correction"):
        gptq(tiny_llama, ids, correction=2)
    with torch.no_grad():
        tiny_llama.model.embed_tokens.weight[ids[0, 3]] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: .*NaN"):
        gptq(tiny_llama, ids, progress=False)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: .*NaN"):
        calibrate_activations(tiny_llama, ids, progress=False)


def test_a_batch_is_what_the_widest_layer_has_memory_for(tiny_llama, ids, monkeypatch):
    widest = max(m.in_features for m in tiny_llama.modules() if isinstance(m, nn.Linear))
    assert len(as_batches(ids, tiny_llama)) == 1
    monkeypatch.setattr(blocks, "_BATCH_BYTES", 4 * widest * (3 * ids.shape[1] + 1))
    assert [len(b["input_ids"]) for b in as_batches(ids[:7], tiny_llama)] == [3, 3, 1]
    monkeypatch.setattr(blocks, "_BATCH_BYTES", 1)
    assert len(as_batches(ids[:7], tiny_llama)) == 7
    # Eager attention keeps its scores: (samples, heads, tokens, tokens).
    tiny_llama.set_attn_implementation("eager")
    long = torch.zeros(5, 4 * widest, dtype=torch.long)
    scores = 4 * tiny_llama.config.num_attention_heads * long.shape[1] ** 2
    monkeypatch.setattr(blocks, "_BATCH_BYTES", 2 * scores)
    assert [len(b["input_ids"]) for b in as_batches(long, tiny_llama)] == [2, 2, 1]


def test_batches_in_every_form(tiny_llama, ids):
    mapping = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    for data in (ids, list(ids.split(4)), iter([mapping])):
        batches = as_batches(data, tiny_llama, batch_size=4)
        assert torch.equal(torch.cat([b["input_ids"] for b in batches]), ids)
        assert all("labels" not in b for b in batches)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0]])
    counted = counted_tokens({"input_ids": mask, "attention_mask": mask}, skip_first=True)
    assert counted.tolist() == [
        [False, False, False, True],
        [False, True, True, False],
        [False, True, False, False],  # its only token
    ]


# --------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("levels", [3, 15, 16, 255])
@pytest.mark.parametrize("tail", [0.0, 30.0])
def test_best_step_is_near_brute_force(levels, tail):
    torch.manual_seed(0)
    rows = torch.randn(100, 32)
    rows[::10, 3] += tail

    def error(step):
        gap = dequantize(quantize(rows, levels, step), levels, step) - rows
        return float((gap.square().sum(1) / rows.square().sum(1)).mean())

    full = float(rows.abs().max()) / grid_center(levels)
    brute = min(error(full * 1.005**-k) for k in range(1400))
    assert error(best_step(rows, levels)) <= 1.05 * brute


def test_best_step_of_silence_and_of_ignored_features():
    assert best_step(torch.zeros(4, 3), 255) == 1.0
    rows = torch.tensor([[1.0, 100.0], [-1.0, 100.0]])
    only_first = best_step(rows, 3, torch.tensor([1.0, 0.0]))
    assert only_first == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_calibrate_sets_every_step_and_the_model_works(request, ids, family):
    model: LlamaForCausalLM | GPT2LMHeadModel | BertForMaskedLM = request.getfixturevalue(family)
    with torch.no_grad():
        wanted = model(ids).logits
    quantize_model(model, weight_levels=255, activation_levels=255)
    steps = calibrate_activations(model, ids, progress=False)
    assert set(steps) == set(layers_of(model))
    assert all(layer.activation.calibrated for layer in layers_of(model).values())
    with torch.no_grad():
        gap = model(ids).logits - wanted
    assert float(gap.square().mean().sqrt() / wanted.std()) < 0.05


def test_layers_with_one_input_share_its_step_and_first_tokens_do_not_count(tiny_llama, ids):
    quantize_model(tiny_llama, weight_levels=16, first_token="own")
    start = copy.deepcopy(tiny_llama)
    steps = calibrate_activations(tiny_llama, ids, progress=False)
    block = "model.layers.0."
    q, k, v = (steps[f"{block}self_attn.{n}_proj"] for n in "qkv")
    assert q == k == v
    assert steps[f"{block}mlp.gate_proj"] == steps[f"{block}mlp.up_proj"]
    loud = int(ids.max()) + 1  # a token that occurs first only, and then is enormous
    with torch.no_grad():
        start.model.embed_tokens.weight[loud] = 1e4
        start.model.layers[0].self_attn.o_proj.weight_log_scale.fill_(-99)
    data = torch.cat([torch.full((8, 1), loud), ids[:, 1:]], dim=1)
    again = calibrate_activations(start, data, progress=False)
    assert again[f"{block}mlp.down_proj"] < 10 * steps[f"{block}mlp.down_proj"]


def test_per_token_scaling_needs_no_calibration(tiny_llama, ids):
    quantize_model(tiny_llama, activation_scaling="token", layer_batch_norm=False)
    assert calibrate_activations(tiny_llama, ids, progress=False) == {}


def test_calibrate_does_all_three_in_order(tiny_llama, ids):
    quantize_model(tiny_llama, weight_levels=8, activation_levels=255, layer_batch_norm=False)
    twin = copy.deepcopy(tiny_llama)
    report = calibrate(tiny_llama, ids, progress=False)
    smooth(twin, ids, start="range", progress=False)
    gptq(twin, ids, progress=False)
    calibrate_activations(twin, ids, progress=False)
    for a, b in zip(tiny_llama.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    summary = report.summary()
    assert summary == json.loads(json.dumps(summary))
    found, smoothed = summary["gptq"], summary["smoothing"]
    assert (found["layers"], found["unreachable_rows"]) == (14, 0)
    assert found["error"] < found["rounding_error"]
    assert smoothed["edges"] == len(report.smoothing.weights) > 0
    before, after = (smoothed["inputs"][i] + smoothed["weights"][i] for i in (0, 1))
    assert 0 < after < before
    assert str(report).startswith("smoothing: ") and "\nGPTQ: 14 layers" in str(report)
    plain = calibrate(twin, ids, gptq_weights=False, smoothing=False, progress=False)
    assert plain.summary() == {"smoothing": None, "gptq": None} and str(plain) == ""


# ----------------------------------------------------------------------------------- the script


def test_quantize_ptq_script(tiny_llama, byte_tokenizer, sample_text, tmp_path, capsys):
    script = import_module("scripts.quantize_ptq")
    tiny_llama.save_pretrained(tmp_path / "float")
    byte_tokenizer.save_pretrained(tmp_path / "float")
    (tmp_path / "text.txt").write_text(sample_text[:6000], encoding="utf-8")
    words = [
        *("--model", tmp_path / "float", "--dataset", tmp_path / "text.txt", "--samples", 6),
        *("--sample_tokens", 64, "--weight_levels", 15, "--group_size", 32),
        *("--activation_levels", 255, "--window", 64, "--max_eval_windows", 5),
        *("--output_dir", tmp_path / "packed", "--metrics", tmp_path / "result.json"),
    ]
    metrics = script.main([str(word) for word in words])
    for file in (tmp_path / "packed" / "metrics.json", tmp_path / "result.json"):
        assert metrics == json.loads(file.read_text("utf-8"))
    assert metrics["gptq"]["layers"] == 14
    assert not {"output_dir", "metrics"} & set(metrics["arguments"])
    assert metrics["calibration_tokens"] == 6 * 64
    assert metrics["float"]["protocol"] == metrics["quantized"]["protocol"]
    ratio = metrics["quantized"]["perplexity"] / metrics["float"]["perplexity"]
    assert 0.9 < ratio < 1.1
    assert "quantised" in capsys.readouterr().out
    packed = LlamaForCausalLM.from_pretrained(tmp_path / "packed")
    assert packed.config.quantization_config.state == "packed"
    assert packed.config.quantization_config.weight_levels == 15
