"""The compiled library against callers who err, inputs no grid holds, copies, threads and forks.

Python hands it pointers: what does not fit must raise before one is followed. What every entry
touches to the byte is looked at by `.ci/valgrind`.
"""

import copy
import io
import os
import pickle
import signal
import threading
import time

import pytest
import torch
from torch import nn

from maqd_hf import MaQDConfig, pack_model, quantize_model
from maqd_hf.kernels import NativeWeight, Table, loader
from maqd_hf.kernels.columns import compensate_columns, descend_columns
from maqd_hf.kernels.decoder import KeyValues
from maqd_hf.kernels.norm import NativeNorm
from maqd_hf.nn import LinearSpec, MaQDEmbedding, MaQDLinear, PackedEmbedding, PackedLinear
from maqd_hf.packing import pack_codes

ROWS, COLUMNS, LEVELS = 24, 64, 16


def layer_of(columns=COLUMNS, rows=ROWS, levels=LEVELS, activations=255, static=False, **settings):
    spec = LinearSpec(levels, activations, "static" if static else "token", **settings)
    layer = MaQDLinear.from_linear(nn.Linear(columns, rows), spec, start="range")
    if static:
        with torch.no_grad():
            layer.activation.log_step.fill_(-3.0)
    return PackedLinear.from_qat(layer)


def arguments(**changes):
    """What `NativeWeight` takes, with some of it exchanged."""
    given = {
        "words": pack_codes(torch.randint(0, LEVELS, (ROWS, COLUMNS)), LEVELS),
        "levels": LEVELS,
        "columns": COLUMNS,
        "scale": torch.rand(ROWS, 1) + 0.5,
        "offset": torch.randn(ROWS, 1),
        "bias": torch.randn(ROWS),
        "activation_levels": 255,
    }
    return given | changes


# ------------------------------------------------------------------------------ refused in Python


@pytest.mark.parametrize(
    "changes",
    [
        {"columns": COLUMNS + 8},
        {"columns": COLUMNS - 8},
        {"levels": 3},
        {"levels": 256},
        {"levels": 1},
        {"levels": 257},
        {"words": torch.zeros(ROWS, 7, dtype=torch.int32)},
        {"words": torch.zeros(ROWS, 8, dtype=torch.int64)},
        {"words": torch.zeros(ROWS * 8, dtype=torch.int32)},
        {"words": torch.zeros(ROWS, 8, dtype=torch.int32, device="meta")},
        {"scale": torch.ones(ROWS - 1, 1)},
        {"scale": torch.ones(ROWS)},
        {"scale": torch.ones(ROWS, 0)},
        {"scale": torch.ones(ROWS, 3)},
        {"scale": torch.ones(ROWS, 32)},
        {"scale": torch.ones(ROWS, 1, device="meta")},
        {"offset": torch.zeros(ROWS)},
        {"offset": torch.zeros(ROWS + 1, 1)},
        {"bias": torch.zeros(ROWS, 1)},
        {"bias": torch.zeros(ROWS - 1)},
        {"bias": torch.zeros(ROWS, device="meta")},
        {"storage": "2"},
        {"storage": "1.6"},
        {"rotation": 0},
        {"rotation": -2},
        {"rotation": 24},
        {"rotation": 2 * COLUMNS},
    ],
    ids=lambda c: ", ".join(f"{k}={getattr(v, 'shape', v)}" for k, v in c.items()),
)
def test_a_weight_of_other_shapes_is_refused(changes, best):
    NativeWeight(**arguments())
    with pytest.raises((ValueError, IndexError)):
        NativeWeight(**arguments(**changes))


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_inputs_of_other_shapes_are_refused(tokens, best):
    weight = NativeWeight(**arguments())
    step = torch.full((1,), 0.1)
    for width in (0, COLUMNS - 1, COLUMNS + 1, 2 * COLUMNS):
        with pytest.raises(ValueError):
            weight(torch.ones(tokens, width), step)
    with pytest.raises(ValueError):
        weight(torch.ones(tokens, COLUMNS, device="meta"), step)
    for shape in [(tokens + 2, 1), (tokens + 2, COLUMNS), (3, tokens + 1, 1)]:
        with pytest.raises((ValueError, RuntimeError)):
            weight(torch.ones(tokens, COLUMNS), torch.ones(shape))


def test_a_table_of_other_shapes_is_refused(best):
    words = pack_codes(torch.randint(0, 15, (9, 20)), 15)
    scale, offset = torch.ones(9, 1), torch.ones(9, 1)
    Table(words, 15, 20, scale, offset)
    for bad in [
        (words[:, :-1], 15, 20, scale, offset),
        (words, 15, 21 + 8, scale, offset),
        (words, 255, 20, scale, offset),
        (words.long(), 15, 20, scale, offset),
        (words, 15, 20, scale[:8], offset),
        (words, 15, 20, scale, offset[:8]),
        (words, 15, 20, scale, offset.flatten()),
    ]:
        with pytest.raises(ValueError):
            Table(*bad)


@pytest.mark.parametrize("ids", [[-1], [9], [0, 8, 2**40], [[0, 1], [-(2**62), 3]]])
def test_ids_outside_a_table_are_refused(ids, best):
    table = PackedEmbedding.from_qat(MaQDEmbedding.from_embedding(nn.Embedding(9, 20), 15))
    with pytest.raises(IndexError):
        table(torch.tensor(ids))


# -------------------------------------------------------------------------------- odd but allowed


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8, 16, 17, 255, 256])
def test_empty_batches_have_empty_outputs(isa, levels):
    for columns, rows in [(COLUMNS, ROWS), (1, 1), (67, 17)]:
        layer = layer_of(columns, rows, levels)
        weight = layer.native_weight()
        for lead in [(0,), (0, 3), (3, 0), (2, 0, 5)]:
            assert weight(torch.ones(*lead, columns), None).shape == (*lead, rows)
            assert layer(torch.ones(*lead, columns)).shape == (*lead, rows)


@pytest.mark.parametrize("activations", [None, 255])
def test_strides_do_not_matter(isa, activations):
    """Inputs, words, scales, offsets and biases that are views of something larger."""
    given = arguments(activation_levels=activations)
    x, step = torch.randn(5, COLUMNS), torch.rand(5, 1) / 10 + 0.01
    step = None if activations is None else step
    expected = NativeWeight(**given)(x, step)
    for name in ("words", "scale", "offset", "bias"):
        spread = torch.stack([given[name], torch.full_like(given[name], 7)], -1)[..., 0]
        assert not spread.is_contiguous()
        assert torch.equal(NativeWeight(**given | {name: spread})(x, step), expected)
    transposed = given["scale"].expand(ROWS, 4).contiguous()
    four = NativeWeight(**given | {"scale": transposed})
    again = NativeWeight(**given | {"scale": transposed.t().contiguous().t()})
    assert torch.equal(four(x, step), again(x, step))
    weight = NativeWeight(**given)
    wide = torch.full((5, 3 * COLUMNS), float("nan"))
    wide[:, COLUMNS : 2 * COLUMNS] = x
    for view in (
        x.t().contiguous().t(),
        wide[:, COLUMNS : 2 * COLUMNS],
        torch.stack([x, -x], 2)[..., 0],
    ):
        assert torch.equal(weight(view, step), expected)
    one = weight(x[:1].expand(5, COLUMNS), None if step is None else step[:1].expand(5, 1))
    assert torch.equal(one, expected[:1].expand(5, ROWS))


def test_threads_do_not_change_a_bit(isa):
    layer = layer_of(512, 1037, 4)  # enough for one token to be shared out
    for tokens in (1, 2, 5, 40):
        x = torch.randn(tokens, 512)
        results = []
        try:
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(layer(x))
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(result, results[0]) for result in results)


# --------------------------------------------------------------------------- no number on the grid


@pytest.mark.parametrize("tokens", [1, 3, 6])
@pytest.mark.parametrize("levels", [2, 3, 15, 16, 255, 256])
def test_infinity_clips_and_nan_is_the_largest_code(isa, levels, tokens):
    """As csrc/maqd.h says, with a static step; what is not a number stays in its token."""
    layer = layer_of(67, 21, 5, levels, static=True)
    x = torch.randn(tokens, 67)
    plain = layer(x)
    strange, tame = x.clone(), x.clone()
    huge = 1e30
    for column, (odd, meant) in enumerate(
        [(float("inf"), huge), (-float("inf"), -huge), (float("nan"), huge), (3e38, huge)]
    ):
        strange[0, 16 * column], tame[0, 16 * column] = odd, meant
    strange[0, 66], tame[0, 66] = float("nan"), huge  # in the part no vector fills
    got = layer(strange)
    assert torch.equal(got, layer(tame)) and got.isfinite().all()
    assert torch.equal(got[1:], plain[1:])


@pytest.mark.parametrize("activations", [None, 255])
def test_strange_tokens_leave_the_others_alone(isa, activations):
    layer = layer_of(67, 21, 4, activations)
    x = torch.randn(6, 67)
    plain = layer(x)
    for odd in (float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-45):
        strange = x.clone()
        strange[2, ::5] = odd
        assert torch.equal(layer(strange)[[0, 1, 3, 4, 5]], plain[[0, 1, 3, 4, 5]])


def test_zeros_stay_zeros(isa):
    layer = layer_of(67, 21, 5)
    assert torch.equal(layer(torch.zeros(3, 67)), layer.bias.expand(3, 21))


# ------------------------------------------------------------------------------------ the machine


def test_a_machine_that_lacks_instructions_takes_the_next_set(monkeypatch):
    """As if the processor had none, one, ... of the instruction sets the library was built for."""
    library, names = loader.library(), list(loader.isas())
    layer, x = layer_of(), torch.randn(3, COLUMNS)
    monkeypatch.delenv("MAQD_KERNEL")

    def forget():
        loader.isas.cache_clear()

    class Masked:
        def __init__(self, supported):
            self.supported = supported

        def __getattr__(self, name):
            if name == "maqd_supported":
                return lambda i: int(i < self.supported)
            return getattr(library, name)

    expected = layer(x)
    try:
        for supported in range(1, len(names) + 1):
            monkeypatch.setattr(loader, "library", lambda n=supported: Masked(n))
            forget()
            assert loader.chosen_isa() == names[supported - 1]
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
            for missing in names[supported:]:
                with monkeypatch.context() as patch:
                    patch.setenv("MAQD_KERNEL", missing)
                    with pytest.raises(ValueError, match=missing):
                        layer(x)
    finally:
        forget()


# ------------------------------------------------------------------------- copies, threads, forks


def model_of(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    defaults = {"weight_levels": 16, "activation_scaling": "token", "embedding_levels": 255}
    quantize_model(model, MaQDConfig(**defaults | settings))
    pack_model(model)
    return model


def write(model, ids):
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=12, do_sample=False).tolist()


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_bfloat16(model):
    """Only transformers' own rotary frequencies are rounded by it; they are put back."""
    twin = copy.deepcopy(model).to(torch.bfloat16).to(torch.float32)
    twin.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    return twin


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        saved_and_loaded,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.to("cpu").to(torch.float32),
        through_bfloat16,
        lambda model: model.requires_grad_(False).share_memory(),
    ],
    ids=["deepcopy", "torch.save", "pickle", "to", "bfloat16 and back", "share_memory"],
)
def test_copies_write_the_same_and_outlive_the_original(copied, best):
    model = model_of()
    ids = torch.randint(3, 200, (2, 5))
    expected = write(model, ids)
    twin = copied(model)
    assert write(twin, ids) == expected
    model = None
    assert write(twin, ids) == expected


def test_copies_do_not_share_changes(best):
    model = model_of()
    twin = copy.deepcopy(model)
    ids = torch.randint(3, 200, (1, 5))
    with torch.no_grad():
        before = model(ids).logits
        for layer in twin.modules():
            if isinstance(layer, PackedLinear):
                layer.weight_scale.mul_(1.5)
        assert torch.equal(model(ids).logits, before)
        assert not torch.allclose(twin(ids).logits, before)


@pytest.mark.parametrize("threads", [1, 2])
def test_generate_from_several_threads_at_once(threads, best):
    """On one model and on two, each with its own prompts."""
    models = [model_of(), model_of(weight_levels=3)]
    prompts = [torch.randint(3, 200, (1 + i % 3, 3 + i)) for i in range(6)]
    expected = [[write(model, ids) for ids in prompts] for model in models]
    problems = []

    def run(number):
        try:
            for i in range(number, number + 4):
                model, ids = i % 2, i % len(prompts)
                if write(models[model], prompts[ids]) != expected[model][ids]:
                    problems.append((number, model, ids))
        except Exception as problem:
            problems.append(problem)

    torch.set_num_threads(threads)
    try:
        workers = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        torch.set_num_threads(1)
    assert not problems


def test_layers_of_several_threads_at_once(isa):
    """Threads that make their weights, change them and multiply; nothing is shared by mistake."""
    problems = []

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        layer, x = layers[seed], torch.randn(3, COLUMNS, generator=generator)
        for _ in range(20):
            layer.native_weight()
            with torch.no_grad():
                expected = layer.quantize_input(x) @ layer.dequantized_weight().t() + layer.bias
                if not torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-4):
                    problems.append(seed)
                layer.weight_scale.mul_(1.01)

    layers = [layer_of(levels=levels) for levels in (3, 4, 8, 16, 255)]
    workers = [threading.Thread(target=run, args=(i,)) for i in range(len(layers))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not problems


def test_a_forked_child_writes_the_same(best):
    model = model_of()
    ids = torch.randint(3, 200, (2, 5))
    torch.set_num_threads(2)
    try:
        expected = write(model, ids)
        children = []
        for _ in range(2):
            child = os.fork()
            if child == 0:
                try:
                    os._exit(0 if write(model, ids) == expected else 1)
                except BaseException:
                    os._exit(2)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        assert write(model, ids) == expected
    finally:
        torch.set_num_threads(1)


# ----------------------------------------------------------------------------------- column loops


def test_column_loops_refuse_other_shapes(best):
    w, factor, step, center = torch.randn(5, 7), torch.eye(5), torch.ones(5, 7), torch.zeros(7)
    compensate_columns(w.clone(), factor, (step, center, 4))
    descend_columns(w.clone(), w.clone(), factor, (step, center, 4))
    for bad in [
        (w[:4], factor, step, center),
        (w[:, :6], factor, step, center),
        (w, factor[:4, :4], step, center),
        (w, factor[:, :4], step, center),
        (w, factor, step[:, :6], center),
        (w, factor, step, center[:6]),
        (w, factor, step.flatten(), center),
    ]:
        w_bad, factor_bad, step_bad, center_bad = (tensor.clone() for tensor in bad)
        grid = (step_bad, center_bad, 4)
        with pytest.raises(ValueError):
            compensate_columns(w_bad, factor_bad, grid)
        with pytest.raises(ValueError):
            descend_columns(w_bad, w.clone(), factor_bad, grid)
    with pytest.raises(ValueError):
        descend_columns(w.clone(), w[:4].clone(), factor, (step, center, 4))


# ---------------------------------------------------------------- found wanting when first written


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_of_another_dtype_is_converted(dtype, isa):
    weight = NativeWeight(**arguments())
    x, step = torch.randn(3, COLUMNS), torch.full((1,), 0.125)
    assert torch.equal(weight(x, step.to(dtype)), weight(x, step))
    layer = layer_of(static=True)
    expected = layer(x)
    torch.testing.assert_close(layer.double()(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_torchs_defaults_do_not_matter(dtype, best):
    """The library writes float32 on the CPU, also where torch would make something else."""
    x, ids = torch.randn(3, COLUMNS), torch.tensor([[3, 5, 7]])
    given = arguments()
    table = {"words": given["words"], "levels": LEVELS, "columns": COLUMNS}
    table |= {"scale": given["scale"], "offset": given["offset"]}
    expected, rows = NativeWeight(**given)(x, None), Table(**table)(ids)
    model = model_of()
    embedded = model.get_input_embeddings()(ids)
    states = model.model(inputs_embeds=embedded).last_hidden_state
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found, taken = NativeWeight(**given)(x, None), Table(**table)(ids)
        again = model.model(inputs_embeds=embedded, use_cache=True).last_hidden_state
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected) and torch.equal(taken, rows)
    assert torch.equal(again, states)


@pytest.mark.parametrize(
    "store", [(1, 1, 2, 16), (3, 1, 2, 16), (2, 1, 1, 16), (2, 1, 2, 8)], ids=str
)
def test_a_store_of_another_model_is_refused(store, best):
    """(blocks, batch, kv_heads, head_dim) where the model has (2, 1, 2, 16)."""
    model = model_of()
    with torch.no_grad():
        model(torch.randint(3, 200, (1, 4)))
    decoder = model.forward.decoder
    with pytest.raises(ValueError):
        decoder(torch.randn(1, 40, 64), torch.arange(40)[None], KeyValues(*store))


def test_norms_of_any_stride_and_no_other_length(best):
    weight = torch.randn(64, 2)[:, 0]
    x = torch.randn(3, 64)
    strided = NativeNorm(64, 1e-5, weight=weight, bias=weight)
    plain = NativeNorm(64, 1e-5, weight=weight.clone(), bias=weight.clone())
    assert torch.equal(strided(x), plain(x))
    assert torch.equal(plain(x.t().contiguous().t()), plain(x))
    with pytest.raises(ValueError):
        NativeNorm(64, 1e-5, weight=weight[:32])
    for wrong in (torch.ones(3, 63), torch.ones(3, 64).double(), torch.ones(64, 3), torch.ones(())):
        with pytest.raises(ValueError):
            plain(wrong)
    with pytest.raises(ValueError):
        plain(x, torch.ones(2, dtype=torch.bool))


@torch.no_grad()
def test_tensors_exchanged_at_the_same_address_are_noticed(best):
    """The allocator may give a new tensor the place of the one the layer was repacked from."""
    layer, x = layer_of(), torch.randn(2, COLUMNS)
    for _ in range(1000):
        layer.bias.data = torch.zeros(ROWS)
        before = layer(x)
        layer.bias.data = torch.zeros(ROWS)
        layer.bias.data = torch.full((ROWS,), 100.0)
        assert float(layer(x).sub_(before).min()) > 99


def test_column_loops_run_in_a_forked_child(best):
    """OpenMP's threads do not survive a fork."""
    w, grid = torch.randn(5, 700), (torch.ones(5, 700), torch.zeros(700), 4)
    torch.set_num_threads(2)
    try:
        compensate_columns(w.clone(), torch.eye(5), grid)
        child = os.fork()
        if child == 0:
            compensate_columns(w.clone(), torch.eye(5), grid)
            os._exit(0)
        for _ in range(100):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.1)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            status = -1
        assert status == 0
    finally:
        torch.set_num_threads(1)
