"""One matrix in every way at hand: packed layers, torch, onnxruntime and llama.cpp's own product.

A part of scripts/benchmark_speed.py. Competitors take turns; every call is one matrix product of
float inputs, from Python. llama.cpp's is ``ggml_mul_mat`` on its plain layout (what its whole
models add, interleaved weights, is in the table of models).
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maqd_hf.kernels import NativeWeight
from maqd_hf.kernels.loader import arena
from maqd_hf.nn import LinearSpec, MaQDLinear, PackedLinear
from maqd_hf.packing import pack_codes

SHAPES = [(1536, 576), (2048, 2048), (4096, 4096), (11008, 4096)]
GGML_TYPES = {"Q8_0": (8, 8.5), "Q4_0": (2, 4.5), "TQ2_0": (35, 2.0625)}  # number, bits a weight
MIB = 2**20
Calls = dict[str, Callable[[], Any]]


def take_turns(work: Calls, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each, ``rounds`` times in turn; short calls are repeated to 20 ms."""
    repeats = {}
    for name, call in work.items():
        call()
        began = time.perf_counter()
        call()
        repeats[name] = max(1, int(0.02 / (time.perf_counter() - began + 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            began = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - began) / repeats[name])
    return seconds


# ------------------------------------------------------------------------------------- ceilings


def read_bandwidth(threads: int, rounds: int) -> float:
    """Bytes per second of reading memory far beyond all caches, on every thread at once: dot
    products of numbers on huge pages, the quickest reader at hand."""
    count = 64 * MIB
    data = [arena.zeros(4 * count).view(torch.float32) for _ in range(threads)]
    best, before = 0.0, torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(max(rounds, 5)):
            began = time.perf_counter()
            list(pool.map(lambda part: torch.dot(part, part), data))
            best = max(best, threads * 4 * count / (time.perf_counter() - began))
    torch.set_num_threads(before)
    return best


def compute_ceiling(rounds: int) -> float:
    """Multiplications per second of an 8-bit packed matrix that stays in the caches, 512 tokens."""
    call = partial(packed_layer(1024, 1024, 256, None), torch.randn(512, 1024))
    return 512 * 1024 * 1024 / min(take_turns({"8 bit": call}, rounds)["8 bit"])


# ---------------------------------------------------------------------------------- competitors


def packed_layer(rows: int, columns: int, levels: int, group_size: int | None) -> PackedLinear:
    spec = LinearSpec(levels, 255, "token", group_size=group_size)
    linear = nn.Linear(columns, rows, bias=False)
    return PackedLinear.from_qat(MaQDLinear.from_linear(linear, spec, start="range"))


def competitors(rows: int, columns: int, x: Tensor) -> Calls:
    """One layer in every way at hand, each a call without arguments."""
    calls: Calls = {}
    for name, levels in (("1.6", 3), ("2", 4), ("3", 8), ("4", 16), ("8", 256)):
        words = pack_codes(torch.randint(0, levels, (rows, columns)), levels)
        scale = torch.ones(rows, 1)
        weight = NativeWeight(words, levels, columns, scale, None, None, 255, name)
        calls[f"maqd {name} bit"] = partial(weight, x, None)
    for levels, bits in ((4, 2), (16, 4)):
        layer = packed_layer(rows, columns, levels, 64)
        calls[f"maqd {bits} bit, groups of 64"] = partial(layer, x)
    calls["torch bf16"] = partial(nn.Linear(columns, rows, bias=False).bfloat16(), x.bfloat16())
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.ones(columns // 64, rows, 2, dtype=torch.bfloat16)
    calls["torch int4, groups of 64"] = lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.bfloat16(), packed, 64, scales
    )
    if find_spec("onnxruntime") and find_spec("onnx"):
        for bits in (2, 4):
            calls[f"onnxruntime {bits} bit, groups of 64"] = onnx_product(rows, columns, bits, x)
    if find_spec("llama_cpp"):
        for kind in GGML_TYPES:
            if kind != "TQ2_0" or columns % 256 == 0:
                calls[f"llama.cpp {kind}"] = ggml_product(rows, columns, kind, x)
    return calls


def onnx_product(rows: int, columns: int, bits: int, x: Tensor) -> Callable[[], Any]:
    """onnxruntime's MatMulNBits with 8-bit activations (accuracy level 4)."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    groups = columns // 64
    weight = np.random.randint(0, 255, (rows, groups, 8 * bits), dtype=np.uint8)
    scales = np.ones(rows * groups, dtype=np.float32)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=bits,
        block_size=64,
        accuracy_level=4,
    )
    tensors = [
        helper.make_tensor("w", TensorProto.UINT8, weight.shape, weight.tobytes(), raw=True),
        helper.make_tensor("s", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True),
    ]
    value = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    graph = helper.make_graph(
        [node], "g", [value("x", shape=["t", columns])], [value("y", shape=["t", rows])], tensors
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads would spin on beside the next competitor
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    inputs = {"x": x.numpy()}
    return lambda: session.run(None, inputs)


class _GgmlParameters(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


def ggml_product(rows: int, columns: int, kind: str, x: Tensor) -> Callable[[], Any]:
    """llama.cpp's own product of one quantised matrix, through the library llama-cpp-python has."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    base, cpu = (ctypes.CDLL(str(folder / f"lib{name}.so")) for name in ("ggml-base", "ggml-cpu"))
    p, i64 = ctypes.c_void_p, ctypes.c_int64
    for name in ("init", "new_tensor_2d", "mul_mat", "new_graph", "get_data"):
        getattr(base, f"ggml_{name}").restype = p
    base.ggml_new_tensor_2d.argtypes = [p, ctypes.c_int, i64, i64]
    base.ggml_mul_mat.argtypes = [p, p, p]
    base.ggml_new_graph.argtypes = base.ggml_get_data.argtypes = [p]
    base.ggml_build_forward_expand.argtypes = [p, p]
    base.ggml_init.argtypes = [_GgmlParameters]
    number, bits = GGML_TYPES[kind]
    room = int(rows * columns * bits / 8) + 16 * x.nbytes + 8 * len(x) * rows + 16 * MIB
    context = base.ggml_init(_GgmlParameters(room, None, False))
    weight = base.ggml_new_tensor_2d(context, number, columns, rows)
    inputs = base.ggml_new_tensor_2d(context, 0, columns, len(x))
    floats = (torch.randn(rows, columns) / columns**0.5).contiguous()
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, p, p, i64, i64, i64, p]
    base.ggml_quantize_chunk(
        number, floats.data_ptr(), base.ggml_get_data(weight), 0, rows, columns, None
    )
    ctypes.memmove(base.ggml_get_data(inputs), x.data_ptr(), x.nbytes)
    graph = base.ggml_new_graph(context)
    base.ggml_build_forward_expand(graph, base.ggml_mul_mat(context, weight, inputs))
    return _Planned(cpu, graph, torch.get_num_threads())


class _GgmlPlan(ctypes.Structure):
    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("threads", ctypes.c_int),
        ("rest", ctypes.c_uint8 * 256),  # pool and callbacks, whatever this version has: zero
    ]


class _Planned:
    """Computes a graph again and again in a work buffer of its own."""

    def __init__(self, cpu: Any, graph: int, threads: int) -> None:
        cpu.ggml_graph_plan.restype = _GgmlPlan
        cpu.ggml_graph_plan.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
        cpu.ggml_graph_compute.argtypes = [ctypes.c_void_p, ctypes.POINTER(_GgmlPlan)]
        self.compute, self.graph = cpu.ggml_graph_compute, graph
        self.plan = cpu.ggml_graph_plan(graph, threads, None)
        self.work = torch.empty(self.plan.work_size + 64, dtype=torch.uint8)
        self.plan.work_data = self.work.data_ptr()

    def __call__(self) -> None:
        self.compute(self.graph, ctypes.byref(self.plan))


# ---------------------------------------------------------------------------------------- table


def bits_of(name: str) -> float | None:
    """Bits a weight takes in memory, from a competitor's name."""
    if name.startswith("llama.cpp"):
        return GGML_TYPES[name.split()[1]][1]
    return 16 if name == "torch bf16" else float(name.split()[1]) if "maqd" in name else None


@torch.no_grad()
def matrices(tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    """A row per shape, number of tokens and competitor, then the machine's two ceilings."""
    found = []
    threads = torch.get_num_threads()
    bandwidth, compute = read_bandwidth(threads, rounds), compute_ceiling(rounds)
    for rows, columns in SHAPES:
        for count in tokens:
            x = torch.randn(count, columns)
            seconds = take_turns(competitors(rows, columns, x), rounds)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            for name, median in medians.items():
                row: dict[str, Any] = {"rows": rows, "columns": columns, "tokens": count}
                row |= {"name": name, "threads": threads, "seconds": median}
                row["to_bf16"] = medians["torch bf16"] / median
                row["operations_per_second"] = 2 * rows * columns * count / median
                bits = bits_of(name)
                if bits:
                    row["bytes_per_second"] = rows * columns * bits / 8 / median
                found.append(row)
                print(f"{rows:>6}x{columns:<6}{count:>4}  {name:34}{median * 1e6:>12.1f} us "
                      f"{row['to_bf16']:>8.2f}x bf16 "
                      f"{row.get('bytes_per_second', 0) / 1e9:>7.1f} GB/s")  # fmt: skip
    print(f"reads {bandwidth / 1e9:.1f} GB/s, multiplies {compute / 1e9:.0f} G/s")
    found.append({"name": "ceilings", "threads": threads, "bytes_per_second": bandwidth,
                  "operations_per_second": 2 * compute})  # fmt: skip
    return found


def plot_roofline(rows: list[dict[str, Any]], target: Path) -> None:
    """Every product between the machine's two ceilings: operations per byte of weights against
    operations per second."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    ceilings = rows[-1]
    figure, axes = pyplot.subplots(figsize=(7, 5))
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows[:-1]:
        if "bytes_per_second" in row and "groups" not in row["name"]:
            speed = row["operations_per_second"]
            groups.setdefault(row["name"], []).append((speed / row["bytes_per_second"], speed))
    intensities = [x for points in groups.values() for x, _ in points]
    line = torch.logspace(math.log10(min(intensities)), math.log10(max(intensities)), 100)
    roof = (line * ceilings["bytes_per_second"]).clamp(max=ceilings["operations_per_second"])
    axes.plot(line, roof, color="black", label="measured ceilings")
    for name, points in groups.items():
        marker = "o" if name.startswith("maqd") else "x"
        axes.plot(*zip(*points, strict=True), marker, label=name, alpha=0.8)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte of weights",
             ylabel="operations a second", title=f"{ceilings['threads']} threads")  # fmt: skip
    axes.legend(fontsize=7)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, bbox_inches="tight")
