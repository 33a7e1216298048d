"""The compiled kernel on every instruction set this machine runs, against the torch reference."""

import copy
import pickle

import pytest
import torch
from torch import nn

from maqd_hf import MaQDConfig, kernels, pack_model, quantize_model
from maqd_hf.functional import quantize, token_step
from maqd_hf.kernels import loader, native
from maqd_hf.nn import (
    LayerBatchNorm,
    LinearSpec,
    MaQDEmbedding,
    MaQDLinear,
    NormSpec,
    PackedEmbedding,
    PackedLinear,
)
from maqd_hf.packing import pack_codes
from tests.support.taken import take

ISAS = list(loader.isas())
TOLERANCE = 2e-6  # of the output's norm: float32 sums in another order


def packed(columns, rows, weight_levels=16, activation_levels=255, bias=True, **settings):
    settings = {"activation_scaling": "token"} | settings
    spec = LinearSpec(weight_levels, activation_levels, **settings)
    return PackedLinear.from_qat(MaQDLinear.from_linear(nn.Linear(columns, rows, bias), spec))


def both(layer, x, monkeypatch):
    """(native, reference) outputs of one layer."""
    assert kernels.native_serves(x, layer.weight, layer.levels, layer.weight_scale.shape[1])
    with torch.no_grad():
        got = layer(x)
        with monkeypatch.context() as patch:
            patch.setenv("MAQD_KERNEL", "reference")
            return got, layer(x)


def test_the_library_was_built():
    assert loader.library() is not None, "no C compiler at install time: the kernel is missing"
    assert ISAS[0] == "portable"
    assert str(kernels.info()["available"]).count(",") == len(ISAS)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9, 12])
@pytest.mark.parametrize("activation_levels", [None, 3, 15, 16, 255, 256])
@pytest.mark.parametrize("weight_levels", [2, 3, 4, 5, 8, 15, 16, 17, 255, 256])
def test_equals_the_reference(isa, weight_levels, activation_levels, tokens, monkeypatch):
    for columns, rows, settings in [
        (64, 33, {}),
        (67, 5, {"bias": False, "weight_offset": False}),
        (96, 48, {"group_size": 32}),
        (1, 1, {}),
    ]:
        layer = packed(columns, rows, weight_levels, activation_levels, **settings)
        got, expected = both(layer, torch.randn(tokens, columns), monkeypatch)
        error = (got - expected).norm() / expected.norm().clamp(min=1e-3)
        assert error < TOLERANCE, (columns, rows, settings)


@pytest.mark.parametrize("storage", list(native.STORAGES))
def test_every_storage_multiplies_every_code(isa, storage):
    """Against a plain integer product: all levels, odd shapes, few tokens and whole tiles."""
    levels = native.STORAGES[storage].levels
    for columns, rows, tokens in [
        (20, 16, 1),
        (77, 33, 3),
        (131, 50, 4),
        (64, 17, 29),
        (520, 21, 2),
    ]:
        codes = torch.randint(0, levels, (rows, columns))
        codes[0], codes[-1] = 0, levels - 1
        weight = native.NativeWeight(
            pack_codes(codes, levels),
            levels,
            columns,
            torch.ones(rows, 1),
            None,
            None,
            255,
            storage,
        )
        x = torch.randint(-127, 128, (tokens, columns))
        exact = x.double() @ (codes.double() - (levels - 1) / 2).t()
        assert torch.equal(weight(x.float(), torch.ones(1)).double(), exact)


@pytest.mark.parametrize("tokens", [1, 4, 17])
@pytest.mark.parametrize("storage", list(native.STORAGES))
def test_the_largest_sums_do_not_overflow(isa, storage, tokens):
    """All codes and inputs at an end of their range, where partial sums are as large as can be."""
    levels, columns = native.STORAGES[storage].levels, 512
    codes = torch.tensor([[levels - 1], [0]]).expand(2, columns).repeat(9, 1).contiguous()
    words, scale = pack_codes(codes, levels), torch.ones(len(codes), 1)
    weight = native.NativeWeight(words, levels, columns, scale, None, None, 256, storage)
    for end in (-127.5, 127.5):
        x = torch.full((tokens, columns), end)
        exact = x.double() @ (codes.double() - (levels - 1) / 2).t()
        torch.testing.assert_close(weight(x, torch.ones(1)).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tokens", [15, 16, 31, 32, 33, 50])
@pytest.mark.parametrize("weight_levels", [3, 7, 16, 256])
def test_many_tokens_equal_the_reference(isa, weight_levels, tokens, monkeypatch):
    """Whole and broken tiles of 16 tokens, panels of one to several row blocks."""
    for columns, rows, settings in [
        (64, 16, {}),
        (128, 150, {"bias": False}),
        (160, 40, {}),
        (192, 33, {"group_size": 64}),
        (192, 70, {"group_size": 32}),
        (128, 50, {"group_size": 128}),
        (256, 50, {"group_size": 128}),
        (128, 90, {"group_size": 64, "activation_levels": 15, "activation_scaling": "group"}),
        (128, 20, {"activation_levels": 16}),
    ]:
        layer = packed(columns, rows, weight_levels, **settings)
        got, expected = both(layer, torch.randn(tokens, columns), monkeypatch)
        error = (got - expected).norm() / expected.norm()
        assert error < TOLERANCE, (columns, rows, settings)


@pytest.mark.parametrize("storage", list(native.STORAGES))
def test_many_inputs_are_multiplied_piece_by_piece(isa, storage):
    """More tokens than a core's own cache holds, exactly; of trits the last unit is not whole."""
    levels, columns, rows, tokens = native.STORAGES[storage].levels, 2048, 72, 808
    codes = torch.randint(0, levels, (rows, columns))
    words, scale = pack_codes(codes, levels), torch.ones(rows, 1)
    weight = native.NativeWeight(words, levels, columns, scale, None, None, 255, storage)
    x = torch.randint(-1, 2, (tokens, columns))  # sums that float32 holds
    exact = x.float() @ (codes.float() - (levels - 1) / 2).t()
    assert torch.equal(weight(x.float(), torch.ones(1)), exact)


def test_the_tiles_of_other_libraries_stay_as_they_were(isa):
    """oneDNN multiplies by AMX too, and configures a thread's tiles once."""
    a, b = torch.randn(48, 96).bfloat16(), torch.randn(80, 96).bfloat16()
    expected = nn.functional.linear(a, b)
    layer = packed(64, 40)
    for tokens in (8, 33):
        with torch.no_grad():
            layer(torch.randn(tokens, 64))
        assert torch.equal(nn.functional.linear(a, b), expected)


def test_a_storage_that_does_not_fit_is_refused():
    words = pack_codes(torch.zeros(4, 8, dtype=torch.int64), 16)
    arguments = (words, 16, 8, torch.ones(4, 1), None, None, 255)
    with pytest.raises(ValueError, match="no storage of 2 fits"):
        native.NativeWeight(*arguments, "2")
    with pytest.raises(ValueError, match="want \\(4, 2\\)"):
        native.NativeWeight(words, 16, 16, *arguments[3:])
    with pytest.raises(ValueError, match="want \\(\\.\\.\\., 8\\)"):
        native.NativeWeight(*arguments)(torch.ones(2, 7), torch.ones(1))


def test_ternary_weights_are_trits_where_their_model_fits_no_cache():
    def chosen(rows, columns, groups=1, levels=3):
        return native.storage_for(levels, rows, columns, groups)

    trits, plain = native.STORAGES["1.6"], native.STORAGES["2"]
    assert chosen(2048, 2048) is chosen(5632, 2048) is trits
    assert chosen(2047, 2048) is chosen(1536, 576) is plain
    assert chosen(2048, 2048, groups=32) is chosen(2048, 2048, levels=4) is plain
    assert chosen(2048, 1 << 16) is plain  # a sum of trits might not fit its accumulator


@pytest.mark.parametrize("storage", list(native.STORAGES))
def test_repacked_piece_by_piece(isa, storage, monkeypatch):
    """All words are released, a piece of 16 rows at a time, and the pieces change nothing."""
    levels = native.STORAGES[storage].levels
    words = pack_codes(torch.randint(0, levels, (50, 96)), levels)
    given = (words, levels, 96, torch.rand(50, 1) + 0.5, torch.randn(50, 1), torch.randn(50), 16)
    x, released = torch.randn(2, 96), []
    expected = native.NativeWeight(*given, storage)(x, None)
    monkeypatch.setattr(native, "_PIECE", 16 * words.shape[1])
    monkeypatch.setattr(native, "release", released.append)
    assert torch.equal(native.NativeWeight(*given, storage)(x, None), expected)
    assert torch.equal(torch.cat(released), words) and max(map(len, released)) == 16


def test_the_product_is_close_to_float64(isa):
    layer = packed(1536, 576, 4)
    x = torch.randn(3, 1536)
    exact = layer.quantize_input(x).double() @ layer.dequantized_weight().double().t()
    exact += layer.bias.double()
    assert (layer(x) - exact).norm() / exact.norm() < TOLERANCE


def test_large_sums_do_not_overflow(isa):
    layer = packed(16384, 16, 256, bias=False)
    layer.weight.fill_(-1)  # every code 255
    weight = layer.weight_scale.double() * 127.5 + layer.weight_offset.double()
    exact = 16384 * weight.squeeze(1)
    with torch.no_grad():
        assert torch.allclose(layer(torch.ones(1, 16384)).double(), exact, rtol=1e-6)


@pytest.mark.parametrize("ratio", [1.0, 0.8])
@pytest.mark.parametrize("levels", [15, 16, 255, 256])
def test_activation_codes_bit_for_bit(isa, levels, ratio):
    x = 3 * torch.randn(5, 96)
    x[0, :4] = torch.tensor([float("inf"), -float("inf"), 0.0, 1e30])
    step = torch.tensor([0.1, 0.5, 0.0, 0.02, 0.3])  # 0: the token's own
    layer = packed(96, 24, 4, levels, group_size=32, activation_clip_ratio=ratio)
    weight = layer.native_weight()
    used = take(weight, x, step)
    assert used["step"][2] == token_step(x[2:3], levels, ratio)
    expected = quantize(x, levels, used["step"].unsqueeze(1)).int() - levels // 2
    assert torch.equal(used["codes"].int(), expected)
    sums = expected.unflatten(1, (3, -1)).sum(-1).float()
    assert torch.equal(used["sums"], torch.cat([sums, sums.sum(1, keepdim=True)], 1))


@pytest.mark.parametrize("tokens", [1, 2, 5, 17])
@pytest.mark.parametrize("activation_levels", [3, 15, 255])
@pytest.mark.parametrize("weight_levels", [2, 3, 4, 8, 16, 255])
def test_products_with_a_step_a_group_equal_the_slow_ones(
    isa, weight_levels, activation_levels, tokens, monkeypatch
):
    for columns, rows, group, settings in [
        (96, 48, 32, {}),
        (192, 33, 64, {"activation_clip_ratio": 0.7}),
        (64, 5, 32, {"bias": False, "weight_offset": False}),
        (32, 17, 32, {}),
    ]:
        settings = {"activation_scaling": "group", "group_size": group} | settings
        layer = packed(columns, rows, weight_levels, activation_levels, **settings)
        x = torch.randn(tokens, columns) * torch.logspace(-3, 3, columns)
        got, expected = both(layer, x, monkeypatch)
        error = (got - expected).norm(dim=1) / expected.norm(dim=1)
        assert float(error.max()) < TOLERANCE, (columns, rows, settings)


def test_codes_of_groups_bit_for_bit(isa):
    x = 3 * torch.randn(5, 96)
    x[0, :4] = torch.tensor([1e-30, -1e30, 0.0, 1e30])
    x[1, 32:64] = 0
    settings = {"activation_clip_ratio": 0.8, "activation_scaling": "group"}
    weight = packed(96, 24, 4, 15, group_size=32, **settings).native_weight()
    used = take(weight, x, torch.zeros(5))
    rows = x.unflatten(1, (3, -1))
    assert torch.equal(used["group_step"].unsqueeze(-1), token_step(rows, 15, 0.8))
    assert bool((used["step"] == 1).all())
    expected = quantize(rows, 15, used["group_step"].unsqueeze(-1)).int() - 7
    assert torch.equal(used["codes"].int(), expected.flatten(1))
    sums = expected.sum(-1).float()
    assert torch.equal(used["sums"][:, :3], sums)
    torch.testing.assert_close(used["sums"][:, 3], (sums * used["group_step"]).sum(1))


def test_steps_of_groups_want_odd_levels(isa):
    words = pack_codes(torch.zeros(4, 32, dtype=torch.int64), 16)
    given = (words, 16, 32, torch.ones(4, 2), None, None)
    with pytest.raises(ValueError, match=r"activation_levels=16.*odd"):
        native.NativeWeight(*given, 16, group_steps=True)
    assert native.NativeWeight(*given, 15, group_steps=True).group_steps
    assert not native.NativeWeight(*given, None, group_steps=True).group_steps


def test_inputs_of_every_shape_dtype_and_view_are_taken(isa, monkeypatch):
    layer = packed(64, 24)
    for x in (
        torch.randn(2, 3, 64),
        torch.randn(64),
        torch.randn(3, 128)[:, ::2],
        torch.randn(2, 64, dtype=torch.bfloat16),
    ):
        got, expected = both(layer, x, monkeypatch)
        assert got.shape == expected.shape and got.dtype == expected.dtype
        assert torch.allclose(got.float(), expected.float(), rtol=1e-2, atol=1e-2)


def test_what_it_does_not_cover_goes_to_the_reference(isa):
    layer = packed(64, 24, group_size=2)  # a group is less than any unit
    assert not kernels.native_serves(torch.ones(1, 64), layer.weight, 16, 32)
    layer = packed(64, 24)
    serves = lambda x: kernels.native_serves(x, layer.weight, 16, 1)  # noqa: E731
    assert serves(torch.ones(1, 64))
    assert not serves(torch.ones(0, 64))
    assert not serves(torch.ones(1, 64).double())
    assert not serves(torch.ones(1, 64, requires_grad=True))
    assert not serves(torch.ones(1, 64, device="meta"))
    assert layer(torch.ones(0, 64)).shape == (0, 24)
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_follows_changed_tensors_and_copies(isa):
    layer = packed(64, 24)
    x = torch.randn(2, 64)
    with torch.no_grad():
        before = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), before)
        layer.weight_scale.mul_(2)
        layer.weight_offset.mul_(2)
        layer.bias.mul_(2)
        assert torch.allclose(layer(x), 2 * before, rtol=1e-5)


def test_an_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("MAQD_KERNEL", "avx99")
    with pytest.raises(ValueError, match=r"avx99.*reference.*portable"):
        packed(8, 8)(torch.ones(1, 8))


def test_whole_model_generates_alike(isa, tiny_llama, monkeypatch):
    # not rotated: sums of this table's few values lie on ties more often, where codes tip over
    config = MaQDConfig(activation_scaling="token", embedding_levels=255, rotation=None)
    quantize_model(tiny_llama, config)
    pack_model(tiny_llama)
    ids = torch.randint(3, 250, (2, 7))
    with torch.no_grad():
        logits = tiny_llama(ids).logits
        text = tiny_llama.generate(ids, max_new_tokens=8, do_sample=False)
        monkeypatch.setenv("MAQD_KERNEL", "reference")
        expected = tiny_llama(ids).logits
        assert (logits - expected).norm() / expected.norm() < 1e-3  # a code may tip over
        assert torch.equal(text, tiny_llama.generate(ids, max_new_tokens=8, do_sample=False))


def test_compiled_graphs_call_the_kernel(isa):
    """One operator in the graph, no break; changed weights and copies are followed."""
    layer = packed(64, 24)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    run = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for tokens in (2, 3, 5):
            x = torch.randn(tokens, 64)
            assert torch.equal(run(x), layer(x))
        layer.weight_scale.mul_(2)
        assert torch.equal(run(x), layer(x))
        twin = copy.deepcopy(layer)
        twin.bias.add_(1)
        assert torch.equal(torch.compile(twin, fullgraph=True, backend="eager")(x), twin(x))
    assert len(graphs) == 1
    assert "maqd.packed_linear" in graphs[0].code
    torch.library.opcheck(
        torch.ops.maqd.packed_linear,
        (x, layer.activation_step or torch.zeros(1), layer._number, 24),
    )


def moved(layer):
    return layer.bfloat16().float()


def loaded(layer):
    """Filled as a model is by ``from_pretrained``, with its parameters replaced."""
    again = PackedLinear(layer.in_features, layer.out_features, True, layer.spec)
    again.load_state_dict(layer.state_dict(), assign=True)
    again.requires_grad_(False).freeze()
    return again


def unpickled(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("made", [copy.copy, copy.deepcopy, moved, loaded, unpickled])
def test_a_layer_is_compiled_once_however_it_was_made(best, made):
    """The kernel's first call changes nothing that a graph depends on."""
    layer, graphs = made(packed(64, 24)), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    run, x = torch.compile(layer, fullgraph=True, backend=backend), torch.randn(2, 64)
    with torch.no_grad():
        assert torch.equal(run(x), run(x))
        assert torch.equal(run(x), layer(x))
    assert len(graphs) == 1


def test_the_compiled_table_serves_every_call(best, monkeypatch):
    calls, ids = [], torch.arange(4)
    table = PackedEmbedding.from_qat(MaQDEmbedding.from_embedding(nn.Embedding(11, 16), 16))
    read = kernels.Table.__call__
    monkeypatch.setattr(kernels.Table, "__call__", lambda *given: calls.append(1) or read(*given))
    assert torch.equal(table(ids), table(ids)) and len(calls) == 2


def test_a_graph_of_a_deleted_layer_says_so():
    number = packed(8, 8)._number
    with pytest.raises(RuntimeError, match="is gone"):
        torch.ops.maqd.packed_linear(torch.ones(1, 8), torch.ones(1), number, 8)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # torch calls its own tracer old
def test_a_trace_holds_the_operations_not_their_results(best):
    table = PackedEmbedding.from_qat(MaQDEmbedding.from_embedding(nn.Embedding(50, 32), 255))
    norm = LayerBatchNorm(32, NormSpec(statistics="token"))
    spec = LinearSpec(4, 255, "token", rotation=16)
    linear = PackedLinear.from_qat(MaQDLinear.from_linear(nn.Linear(32, 8), spec, start="range"))
    model = nn.Sequential(table, norm, linear).eval()
    traced = torch.jit.trace(model, torch.arange(7).view(1, 7))
    others = torch.tensor([[3, 3, 49, 0, 11, 12, 40]])
    torch.testing.assert_close(traced(others), model(others), rtol=1e-4, atol=1e-4)
