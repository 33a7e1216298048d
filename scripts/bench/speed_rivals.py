"""Products of one matrix by other libraries, for `scripts.bench.speed_kernels`.

Every rival gets the same ternary weight (nearly every format has it on its grid, and no product's
time depends on the codes) and keeps it with a scale for 64 inputs where it can choose. Each is
checked once against the product in float64: one that is wrong is named, not timed. All but torch
come with ``pip install maqd_hf[bench]``; those at hand run, the others are named.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GROUP = 64
GGML_TYPES = {"Q8_0": (8, 8.5), "Q4_0": (2, 4.5), "TQ2_0": (35, 2.0625)}  # number, bits a weight
WRONG = 0.15  # relative error: 8-bit inputs cost 0.006, Q4_0's grid, which has no 1 beside -1, 0.09
MIB = 2**20

Calls = dict[str, Callable[[], Any]]
Products = Iterator[tuple[str, Callable[[], Any]]]


def rivals(rows: int, columns: int, x: Tensor) -> tuple[Calls, dict[str, str]]:
    """The products at hand of ``x`` (tokens, columns) with a weight (rows, columns).

    Each is a call that returns (tokens, rows), alone or as the first of several. The second result
    says of the others why they are not there.
    """
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    expected = (x.double() @ codes.double().t()).float()
    calls: Calls = {}
    missing: dict[str, str] = {}
    for package, (_, make) in PACKAGES.items():
        if why := unavailable(package):
            missing[package] = why
            continue
        for name, call in make(codes, x):
            got = call()
            got = got if isinstance(got, Tensor) else torch.as_tensor(got[0])
            error = float((got.float() - expected).norm() / expected.norm())
            if error < WRONG:
                calls[name] = call
            else:
                missing[name] = f"wrong at {rows}x{columns}, {len(x)} tokens: error {error:.2g}"
    return calls, missing


def llama_cpp_build() -> list[str]:
    """The instruction sets and other features llama.cpp was built with and finds here."""
    if unavailable("llama-cpp-python"):
        return []
    import llama_cpp

    said = llama_cpp.llama_print_system_info().decode()
    parts = [part.split(":")[-1].split("=") for part in said.split("|")]
    return [part[0].strip() for part in parts if len(part) == 2 and part[1].strip() == "1"]


def unavailable(package: str) -> str | None:
    """Why a package of ``PACKAGES`` cannot run here, or None."""
    try:
        for module in PACKAGES[package][0]:
            import_module(module)
    except ImportError as error:
        return f"{error}; pip install maqd_hf[bench]"
    return None


def bits_of(name: str) -> float | None:
    """The bits that a weight takes in memory, by a product's name; None where unknown."""
    if name.startswith("llama.cpp"):
        return GGML_TYPES[name.split()[1]][1]
    return 16 if name == "torch bf16" else None


def pack(codes: Tensor, bits: int, zero: int) -> Tensor:
    """``codes + zero`` (rows, columns) in bytes, the first code in a byte's lowest bits."""
    per = 8 // bits
    shifts = bits * torch.arange(per)
    fields = (codes.long() + zero & (1 << bits) - 1).unflatten(1, (-1, per))
    return (fields << shifts).sum(-1).to(torch.uint8)


def torch_products(codes: Tensor, x: Tensor) -> Products:
    """bfloat16, and the 4-bit product behind torch's own quantized models."""
    rows, columns = codes.shape
    yield "torch bf16", partial(torch.nn.functional.linear, x.bfloat16(), codes.bfloat16())
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((codes + 8).int(), 1)
    scales = torch.tensor([1.0, 0.0]).bfloat16().expand(columns // GROUP, rows, 2).contiguous()

    def int4() -> Tensor:
        found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16(), packed, GROUP, scales
        )
        return found

    yield "torch int4, groups of 64", int4


def onnx_products(codes: Tensor, x: Tensor) -> Products:
    """onnxruntime's MatMulNBits with 8-bit activations (accuracy level 4)."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    rows, columns = codes.shape
    scales = np.ones(rows * columns // GROUP, dtype=np.float32)
    inputs = {"x": x.numpy()}
    for bits in (2, 4):
        weight = pack(codes, bits, 1 << bits - 1).view(rows, columns // GROUP, -1).numpy()
        node = helper.make_node(
            "MatMulNBits",
            ["x", "w", "s"],
            ["y"],
            domain="com.microsoft",
            K=columns,
            N=rows,
            bits=bits,
            block_size=GROUP,
            accuracy_level=4,
        )
        tensors = [
            helper.make_tensor("w", TensorProto.UINT8, weight.shape, weight.tobytes(), raw=True),
            helper.make_tensor("s", TensorProto.FLOAT, scales.shape, scales.tobytes(), raw=True),
        ]
        value = partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
        values = [value("x", shape=["t", columns])], [value("y", shape=["t", rows])]
        graph = helper.make_graph([node], "g", *values, tensors)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # its threads would spin on beside the next competitor
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        call = partial(session.run, None, inputs)
        yield f"onnxruntime {bits} bit, groups of 64", call


def openvino_products(codes: Tensor, x: Tensor) -> Products:
    """OpenVINO's compressed weights; without the hint it would compute in bfloat16 where it can."""
    import numpy as np
    import openvino as ov
    from openvino import opset13 as ops

    rows, columns = codes.shape
    shape = (rows, columns // GROUP, GROUP)

    def constant(kind: str, data: Tensor, shape: tuple[int, ...]) -> Any:
        tensor = ov.Tensor(getattr(ov.Type, kind), ov.Shape(shape))
        tensor.data.reshape(-1).view(np.uint8)[:] = data.flatten().view(torch.uint8).numpy()
        return ops.convert(ov.op.Constant(tensor), "f16")

    inputs = {0: x.numpy()}
    for kind, bits, zero in (("u2", 2, 2), ("i4", 4, 0), ("i8", 8, 0)):
        if not hasattr(ov.Type, kind):
            continue
        weight = constant(kind, pack(codes, bits, zero), shape)
        if zero:
            zeros = pack(torch.zeros(1, rows * columns // GROUP), bits, zero)
            weight = ops.subtract(weight, constant(kind, zeros, (*shape[:2], 1)))
        weight = ops.multiply(weight, ops.constant(np.ones((*shape[:2], 1), np.float16)))
        weight = ops.convert(ops.reshape(weight, np.array([rows, columns]), False), "f32")
        given = ops.parameter([-1, columns], np.float32)
        model = ov.Model([ops.matmul(given, weight, False, True)], [given])
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP,  # 8-bit activations
        }
        request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
        yield f"openvino {kind}, groups of 64", partial(request.infer, inputs)


def auto_round_products(codes: Tensor, x: Tensor) -> Products:
    """The kernels of auto-round-lib; the number of threads must stay what it was when packing."""
    import auto_round_kernel as ark

    rows, columns = codes.shape
    scales, bias = torch.ones(columns // GROUP, rows), torch.zeros(rows)
    for kind in ("int2", "int4", "int8"):
        format_ = (GROUP, "int8", kind, "fp32", False)
        none = torch.empty(0, dtype=torch.int8)
        weight = ark.repack_quantized_weight(codes.t().contiguous(), scales, none, *format_)
        yield (
            f"auto-round-lib {kind}, groups of 64",
            partial(ark.woqgemm, x, weight, bias, rows, columns, *format_),
        )


class _GgmlParameters(ctypes.Structure):
    _fields_ = [
        ("size", ctypes.c_size_t),
        ("buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


def ggml_products(codes: Tensor, x: Tensor) -> Products:
    """llama.cpp's own product, ``ggml_mul_mat`` on its plain layout, through the library that
    llama-cpp-python has; what its whole models add, interleaved weights, is in the table of
    models."""
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
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_quantize_chunk.argtypes = [ctypes.c_int, p, p, i64, i64, i64, p]
    rows, columns = codes.shape
    floats = codes.float().contiguous()
    for kind, (number, bits) in GGML_TYPES.items():
        if kind == "TQ2_0" and columns % 256:
            continue  # its blocks do not fit: llama.cpp falls back to another type
        room = int(rows * columns * bits / 8) + 16 * x.nbytes + 8 * len(x) * rows + 16 * MIB
        context = base.ggml_init(_GgmlParameters(room, None, False))
        weight = base.ggml_new_tensor_2d(context, number, columns, rows)
        inputs = base.ggml_new_tensor_2d(context, 0, columns, len(x))
        data = base.ggml_get_data(weight)
        base.ggml_quantize_chunk(number, floats.data_ptr(), data, 0, rows, columns, None)
        ctypes.memmove(base.ggml_get_data(inputs), x.data_ptr(), x.nbytes)
        graph = base.ggml_new_graph(context)
        product = base.ggml_mul_mat(context, weight, inputs)
        base.ggml_build_forward_expand(graph, product)
        numbers = (ctypes.c_float * (len(x) * rows)).from_address(base.ggml_get_data(product))
        out = torch.frombuffer(numbers, dtype=torch.float32).view(len(x), rows)
        yield f"llama.cpp {kind}", _Planned(cpu, graph, out)


class _GgmlPlan(ctypes.Structure):
    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("threads", ctypes.c_int),
        ("rest", ctypes.c_uint8 * 256),  # pool and callbacks, whatever this version has: zero
    ]


class _Planned:
    """Computes a graph again and again in a work buffer of its own."""

    def __init__(self, cpu: Any, graph: int, out: Tensor) -> None:
        cpu.ggml_graph_plan.restype = _GgmlPlan
        cpu.ggml_graph_plan.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
        cpu.ggml_graph_compute.argtypes = [ctypes.c_void_p, ctypes.POINTER(_GgmlPlan)]
        self.compute, self.graph, self.out = cpu.ggml_graph_compute, graph, out
        self.plan = cpu.ggml_graph_plan(graph, torch.get_num_threads(), None)
        self.work = torch.empty(self.plan.work_size + 64, dtype=torch.uint8)
        self.plan.work_data = self.work.data_ptr()

    def __call__(self) -> Tensor:
        self.compute(self.graph, ctypes.byref(self.plan))
        return self.out


# Package -> the modules it takes, and its products.
PACKAGES: dict[str, tuple[list[str], Callable[[Tensor, Tensor], Products]]] = {
    "torch": ([], torch_products),
    "onnxruntime": (["onnxruntime", "onnx"], onnx_products),
    "openvino": (["openvino"], openvino_products),
    "auto-round-lib": (["auto_round_kernel"], auto_round_products),
    "llama-cpp-python": (["llama_cpp"], ggml_products),
}
