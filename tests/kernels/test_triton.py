"""The GPU kernels: layout and choice of them anywhere, their results where there is Triton.

Tests marked `triton` run on the GPU, or with TRITON_INTERPRET=1 on CPU tensors in Triton's own
interpreter: the same kernel source, one program after the other. `test_compiles_for_gpus` needs no
GPU either: Triton's compiler and assembler run anywhere.
"""

import copy
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from maqd_hf import kernels
from maqd_hf.functional import grid_center, quantize, token_step
from maqd_hf.kernels import gpu
from maqd_hf.nn import LinearSpec, MaQDLinear, Masks, PackedLinear
from maqd_hf.packing import pack_codes
from tests.support.calls import masked

LEVELS = [2, 3, 4, 5, 7, 8, 15, 16, 17, 128, 130, 255, 256]
CUDA = torch.device("cuda", 0)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TOLERANCE = 2e-6  # of the output's norm: float32 sums in another order
# the interpreter has no bfloat16; what rounding the output to a type may cost is its eps
DTYPES = {torch.float32: TOLERANCE, torch.float16: 5e-4}
DTYPES |= {} if INTERPRETED else {torch.bfloat16: 4e-3}


def packed(columns, rows, weight_levels=16, activation_levels=255, scaling="token", **settings):
    bias = settings.pop("bias", True)
    spec = LinearSpec(weight_levels, activation_levels, scaling, **settings)
    layer = MaQDLinear.from_linear(nn.Linear(columns, rows, bias), spec, start="range")
    if scaling == "static" and activation_levels is not None:
        with torch.no_grad():
            layer.activation.log_step.fill_(-3.0)
    return PackedLinear.from_qat(layer)


# ------------------------------------------------------------------------------- without Triton


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 67, 128, 300])
@pytest.mark.parametrize("levels", LEVELS)
def test_layout_is_what_its_sentence_says(levels, columns):
    codes = torch.randint(0, levels, (3, columns))
    layout = gpu.repack(pack_codes(codes, levels), levels, columns)
    bits = gpu.storage_bits(levels)
    planes = 8 // bits
    assert layout.shape == (3, gpu.stride(columns, levels)) and layout.dtype == torch.uint8
    assert layout.shape[1] % 32 == 0 and 0 <= layout.shape[1] * planes - columns < 32 * planes
    for j in range(layout.shape[1]):
        for p in range(planes):
            k = j // 32 * 32 * planes + 32 * p + j % 32
            found = (layout[:, j].long() >> (bits * p)) & (2**bits - 1)
            assert torch.equal(found, codes[:, k] if k < columns else torch.zeros(3).long())


def test_repacking_in_blocks_of_rows_changes_nothing(monkeypatch):
    layer = packed(96, 7, 5, 16, group_size=32)
    whole = weight_of(layer)
    monkeypatch.setattr(gpu, "_CODES", 250)
    parts = weight_of(layer)
    assert torch.equal(parts.codes, whole.codes)
    torch.testing.assert_close(parts.constant, whole.constant)


@pytest.mark.parametrize("levels", [3, 16, 255, 256])
def test_even_activation_levels_have_a_constant(levels):
    layer = packed(96, 7, levels, 16, group_size=32)
    half_a_code_in_every_input = layer.dequantized_weight().sum(1) / 2
    torch.testing.assert_close(
        weight_of(layer).constant, half_a_code_in_every_input, rtol=1e-5, atol=1e-5
    )
    assert not weight_of(packed(96, 7, levels, 15)).constant.any()


def test_factors_of_integer_products_are_int8_and_mean_the_codes():
    for levels in range(2, 257):
        weight = weight_of(packed(32, 2, levels))
        constants = weight.constants(True, gpu.tiles_for(1, False))
        codes = torch.arange(levels)
        factor = codes * constants["TIMES"] + constants["PLUS"]
        assert factor.min() >= -128 and factor.max() <= 127
        units = (factor + 0.5 * constants["HALF"]) / constants["TIMES"]
        assert torch.equal(units, codes - grid_center(levels))
        floats = weight.constants(False, gpu.tiles_for(1, False))
        assert torch.equal(codes + floats["PLUS"], codes - grid_center(levels))


def test_no_group_ends_within_a_tile():
    for size in (32, 64, 96, 128, 160, 192, 256, 512, 1024):
        for levels in (2, 16, 255):
            for tiles in (*gpu.TILES.values(), *gpu.FLOAT32_TILES.values()):
                constants = weight_of(packed(2 * size, 2, levels, group_size=size)).constants(
                    True, tiles
                )
                planes = 8 // constants["BITS"]
                between = 32 * constants["FLUSH"]  # inputs from one look at the scales to the next
                assert size % between == 0 and planes % constants["FLUSH"] == 0
                assert constants["BYTES"] == 32 or size % (planes * constants["BYTES"]) == 0


def test_what_triton_lacks_is_said(monkeypatch):
    missing = gpu.missing.__wrapped__  # not what an earlier call found
    assert missing(torch.device("cpu")) == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert missing(CUDA) == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)
    assert missing(CUDA) == "Triton is not installed"
    monkeypatch.setattr(gpu, "find_spec", lambda _: object())
    assert missing(CUDA) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert missing(CUDA) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert "ROCm" in missing(CUDA)


def test_info_speaks_of_the_gpu(monkeypatch):
    monkeypatch.delenv("MAQD_KERNEL", raising=False)
    monkeypatch.setattr(gpu, "missing", lambda _: "no luck")
    assert kernels.info()["gpu"] == "torch reference: no luck"
    monkeypatch.setattr(gpu, "missing", lambda _: None)
    assert kernels.info()["gpu"] == "Triton"
    monkeypatch.setenv("MAQD_KERNEL", "reference")
    assert kernels.info()["gpu"] == "torch reference: MAQD_KERNEL asks for the reference"


@pytest.mark.parametrize("kernel", [None, "portable"])
@pytest.mark.parametrize("scaling", ["token", "static"])
def test_a_compiled_graph_on_a_gpu_holds_one_operator(scaling, kernel, monkeypatch):
    """Traced with tensors that only claim to be on a GPU; the CPU's library does not matter."""
    monkeypatch.setattr(gpu, "missing", lambda _: None)
    monkeypatch.delenv("MAQD_KERNEL", raising=False)
    if kernel:
        monkeypatch.setenv("MAQD_KERNEL", kernel)
    torch.compiler.reset()  # what other tests compiled counts against a limit
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    with FakeTensorMode(), torch.no_grad():
        layer = PackedLinear(64, 24, True, LinearSpec(16, 255, scaling), device=CUDA)
        x = torch.empty(2, 3, 64, device=CUDA, dtype=torch.float16)
        y = torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert y.shape == (2, 3, 24) and y.dtype == torch.float16 and y.device == CUDA
    assert len(graphs) == 1 and graphs[0].code.count("maqd.packed_linear") == 1


def test_what_the_gpu_does_not_cover_stays_with_torch(monkeypatch):
    monkeypatch.setattr(gpu, "missing", lambda _: None)
    monkeypatch.delenv("MAQD_KERNEL", raising=False)
    assert gpu.fits(64, 1) and gpu.fits(64, 2) and gpu.fits(67, 1)
    assert not gpu.fits(64, 4) and not gpu.fits(1 << 17, 1)
    torch.compiler.reset()
    serves = []

    def note(x, weight, groups=1):
        serves.append(kernels.native_serves(x, weight, 16, groups))
        return x

    cases = [
        (True, (2, 64), torch.float16, 1, CUDA),
        (True, (2, 64), torch.float32, 2, CUDA),
        (False, (2, 64), torch.float32, 4, CUDA),  # groups of 16
        (False, (2, 64), torch.float64, 1, CUDA),
        (False, (0, 64), torch.float32, 1, CUDA),
        (False, (2, 64), torch.float32, 1, torch.device("cuda", 1)),  # not where the weight is
    ]
    with FakeTensorMode():
        weight = torch.empty(24, 8, dtype=torch.int32, device=CUDA)
        run = torch.compile(note, fullgraph=False, backend="eager", dynamic=False)
        for _, shape, dtype, groups, device in cases:
            run(torch.empty(shape, dtype=dtype, device=device), weight, groups)
        monkeypatch.setenv("MAQD_KERNEL", "reference")
        torch.compiler.reset()
        run(torch.empty(2, 64, device=CUDA), weight)
    assert serves == [expected for expected, *_ in cases] + [False]


def test_the_operator_has_an_implementation_for_cuda():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has("maqd::packed_linear", "CUDA") and has("maqd::packed_linear", "CPU")


def test_the_benchmark_says_that_there_is_no_gpu(monkeypatch, capsys):
    benchmark = import_module("scripts.bench.gpu")
    monkeypatch.setattr(gpu, "missing", lambda _: "Triton is not installed")
    assert benchmark.main([]) == 1
    assert capsys.readouterr().err == "no GPU to measure: Triton is not installed\n"


# ---------------------------------------------------------------------------------- with Triton


@pytest.fixture
def device():
    """Where Triton runs here."""
    if INTERPRETED:
        return torch.device("cpu")
    problem = gpu.missing(CUDA)
    assert problem is None, (
        f"{problem}; without a GPU: TRITON_INTERPRET=1 python -m pytest -m triton"
    )
    return CUDA


def weight_of(layer):
    return gpu.GpuWeight(
        layer.weight,
        layer.levels,
        layer.in_features,
        layer.weight_scale,
        layer.weight_offset,
        layer.bias,
        layer.spec.activation_levels,
        activation_clip_ratio=layer.spec.activation_clip_ratio,
        group_steps=layer.spec.input_group is not None,
    )


def assert_equals_the_reference(layer, x, step):
    """`step` is what the layer hands to its kernel."""
    got = weight_of(layer)(x, step)
    with torch.no_grad():
        expected = layer(x.float())
    assert got.dtype == x.dtype and got.shape == expected.shape
    error = (got.float() - expected).norm() / expected.norm().clamp(min=1e-3)
    assert error < DTYPES[x.dtype]


SHAPES = [
    (67, 5, {"bias": False, "weight_offset": False}),
    (192, 33, {"group_size": 32}),
    (192, 20, {"group_size": 96}),
    (512, 18, {"group_size": 256}),
    (300, 17, {}),
    (1, 1, {}),
]


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation_levels", [None, 3, 16, 255, 256])
@pytest.mark.parametrize("weight_levels", LEVELS)
def test_equals_the_reference(weight_levels, activation_levels, dtype, device):
    step = None if activation_levels is None else torch.zeros(1, device=device)
    for tokens, (columns, rows, settings) in zip((1, 3, 17, 64, 2, 1), SHAPES, strict=True):
        layer = packed(columns, rows, weight_levels, activation_levels, **settings).to(device)
        x = torch.randn(tokens, columns, device=device).to(dtype)
        assert_equals_the_reference(layer, x, step)


@pytest.mark.triton
@pytest.mark.parametrize("activation_levels", [3, 15, 255])
@pytest.mark.parametrize("weight_levels", LEVELS)
def test_steps_of_groups(weight_levels, activation_levels, device):
    for tokens, columns, rows, group in [
        (1, 64, 33, 32),
        (3, 192, 5, 96),
        (17, 256, 20, 64),
        (2, 64, 7, 64),  # one group
    ]:
        layer = packed(
            columns, rows, weight_levels, activation_levels, "group", group_size=group
        ).to(device)
        x = torch.randn(tokens, columns, device=device)
        x *= torch.logspace(-3, 3, columns, device=device)
        assert_equals_the_reference(layer, x, None)


@pytest.mark.triton
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 130])
@pytest.mark.parametrize("activation_levels", [None, 255])
def test_every_tile_equals_the_reference(tokens, activation_levels, device):
    """More rows and tokens than one program has."""
    step = None if activation_levels is None else torch.zeros(1, device=device)
    layer = packed(256, 140, 4, activation_levels).to(device)
    assert_equals_the_reference(layer, torch.randn(tokens, 256, device=device), step)


@pytest.mark.triton
@pytest.mark.parametrize("ratio", [1.0, 0.8])
@pytest.mark.parametrize("levels", [2, 15, 16, 255, 256])
def test_activation_codes_bit_for_bit(levels, ratio, device):
    x = (3 * torch.randn(6, 97)).to(device)
    x[0, :4] = torch.tensor([float("inf"), -float("inf"), 0.0, 1e30], device=device)
    x[4] = (torch.arange(97, device=device) - 48.0) / 2  # ties
    x[5] = 0
    step = torch.tensor([0.1, 0.5, 0.0, 0.02, 1.0, 0.0], device=device)  # 0: the token's own
    weight = weight_of(packed(97, 24, 4, levels, activation_clip_ratio=ratio).to(device))
    codes, used, sums = weight.quantize(x, step)
    own = token_step(x[[2, 5]], levels, ratio).flatten()
    expected_step = torch.where(step == 0, torch.zeros_like(step), step)
    expected_step[2], expected_step[5] = own[0], own[1]
    assert torch.equal(used, expected_step)
    expected = quantize(x, levels, used.unsqueeze(1)).int() - levels // 2
    assert torch.equal(codes[:, :97].int(), expected)
    for token in (2, 5):
        own = weight.quantize(x[token : token + 1], None)
        assert torch.equal(own[0][:, :97], codes[token : token + 1, :97])
        assert own[1] == used[token] and own[2] == sums[token]
    assert torch.equal(sums, expected.sum(1).int())


@pytest.mark.triton
def test_random_steps_give_the_same_codes(device):
    """Division and ties: 100 000 numbers of all sizes on random grids."""
    weight = weight_of(packed(4096, 1, 4, 255).to(device))
    x = torch.randn(25, 4096, device=device) * torch.logspace(-30, 30, 25, device=device)[:, None]
    step = x.abs().amax(1) * torch.rand(25, device=device) / 100
    codes, used, _ = weight.quantize(x, step)
    assert torch.equal(used, step)
    assert torch.equal(codes.int() + 127, quantize(x, 255, step[:, None]).int())


@pytest.mark.triton
@pytest.mark.parametrize("activation_levels", [None, 255])
@pytest.mark.parametrize("scaling", ["token", "static"])
def test_not_a_number_stays_in_its_row(scaling, activation_levels, device):
    layer = packed(96, 24, 16, activation_levels, scaling).to(device)
    x = torch.randn(4, 96, device=device)
    x[1, 5] = float("nan")
    x[2] = 1e30
    step = None
    if activation_levels:
        step = torch.zeros(1, device=device) if scaling == "token" else layer.activation_step
    got, expected = weight_of(layer)(x, step), layer(x)
    assert torch.equal(got.isnan(), expected.isnan()) and expected[1].isnan().all()
    kept = torch.tensor([0, 2, 3], device=device)
    got, expected = got[kept].double(), expected[kept].double()
    error = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert (error < TOLERANCE).all()
    x[2, 7] = float("inf")
    if scaling == "token" and activation_levels:
        got, expected = weight_of(layer)(x, step), layer(x)
        assert got[2].isnan().all() and expected[2].isnan().all()


@pytest.mark.triton
def test_sums_of_the_largest_codes(device):
    layer = packed(16384, 16, 256, bias=False).to(device)
    layer.weight.fill_(-1)  # every code 255
    exact = 16384 * (layer.weight_scale.double() * 127.5 + layer.weight_offset.double()).squeeze(1)
    got = weight_of(layer)(torch.ones(1, 16384, device=device), torch.zeros(1, device=device))
    assert torch.allclose(got.double(), exact, rtol=1e-6)


@pytest.mark.triton
@pytest.mark.parametrize("scaling", ["token", "static"])
@pytest.mark.parametrize("first_token", ["own", "shared"])
def test_a_layer_runs_on_it(first_token, scaling, device, monkeypatch):
    """Through `forward`: steps per token, static and mixed; shapes, views, changes and copies."""
    layer = packed(96, 24, 5, 255, scaling, first_token=first_token, group_size=32).to(device)
    masks = Masks(first=torch.tensor([[True, False, False]] * 2, device=device))
    x = torch.randn(2, 3, 192, device=device)[..., ::2]
    with torch.no_grad(), monkeypatch.context() as patch, layer.context.given(masks):
        expected = layer(x)
        patch.delenv("MAQD_KERNEL")
        patch.setattr(kernels, "weight_type", lambda _: gpu.GpuWeight)
        before = layer(x)
        assert (before - expected).norm() / expected.norm() < TOLERANCE
        assert torch.equal(masked(copy.deepcopy(layer), x, masks), before)
        assert layer(x[:0]).shape == (0, 3, 24)
        for tensor in (layer.weight_scale, layer.weight_offset, layer.bias):
            tensor.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
        torch.compiler.reset()
        run = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(run(x), layer(x))
        weight = layer.native_weight()
        assert type(weight) is gpu.GpuWeight and weight(
            x[:0], torch.zeros(1, device=device)
        ).shape == (0, 3, 24)


@pytest.mark.triton
def test_compiles_for_gpus():
    """For sm_80 and sm_90: no registers are spilled and the shared memory suffices everywhere."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support/compile_for_gpus.py"
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
