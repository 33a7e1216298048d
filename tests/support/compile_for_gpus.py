"""Compiles the GPU kernels down to machine code, on any machine with Triton; no GPU is used.

Prints what every variant takes; exits with 1 if one spills more than a few registers or wants more
shared memory than the GPUs have.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from maqd_hf.kernels import gpu, gpu_kernels
from maqd_hf.nn import LinearSpec, MaQDLinear, PackedLinear

SHARED = 99 * 1024  # of the least of these GPUs (8.6, 8.9)
STACK = 64  # bytes, where spilled registers go
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
POINTERS = {"scale", "offset", "constant", "bias", "step", "used_step"}
INTEGERS = {"tokens", "rows", "groups", "columns", "x_stride", "weight_stride", "codes_stride"}


def compiled(kernel, types, constants, capability):
    """(bytes of stack, registers, bytes of shared memory) of one variant."""
    options = {n: constants.pop(n) for n in ("num_warps", "num_stages") if n in constants}
    types = {n: "*fp32" for n in POINTERS} | {n: "i32" for n in INTEGERS} | types
    types = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    aligned = {"x_stride", "weight_stride", "codes_stride", "columns", "rows"}
    divisible = [["tt.divisibility", 16]]
    attributes = {
        (i,): divisible
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name in aligned
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, values, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary.asm["cubin"])
        said = subprocess.run(
            [TOOL, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[2]), int(found[1]), binary.metadata.shared


def variants():
    """(name, kernel, types, constants) of what is compiled."""
    for x, levels, block in (("fp32", 255, 4096), ("bf16", 256, 1024), ("fp16", 15, 64)):
        types = {"x": f"*{x}", "codes": "*i8", "sums": "*i32", "step_stride": "i32"}
        constants = {
            "LEVELS": levels,
            "CLIP_RATIO": 0.8 if levels == 15 else 1.0,
            "BLOCK": block,
            "num_warps": 4 if block <= 1024 else 8,
        }
        if x == "bf16":
            constants["step"] = None  # every token has its own
        yield f"quantize {x} {levels}", gpu_kernels.quantize_tokens, types, constants
    grids = [(4, None), (3, 64), (16, 64), (16, None), (256, None), (255, 128)]
    grids = [(*grid, "token") for grid in grids] + [(4, 64, "group"), (16, 64, "group")]
    for levels, group_size, scaling in grids:
        spec = LinearSpec(levels, 255, scaling, group_size=group_size)
        layer = MaQDLinear.from_linear(nn.Linear(512, 8), spec, start="range")
        packed = PackedLinear.from_qat(layer)
        for x in ("i8", "bf16", "fp32"):
            weight = gpu.GpuWeight(
                packed.weight,
                levels,
                512,
                packed.weight_scale,
                packed.weight_offset,
                packed.bias,
                255 if x == "i8" else None,
                group_steps=scaling == "group",
            )
            for tiles in (gpu.FLOAT32_TILES if x == "fp32" else gpu.TILES).values():
                types = {"x": f"*{x}", "weight": "*u8"}
                types["sums"] = "*fp32" if scaling == "group" else "*i32"
                types["scale"] = "*fp32" if group_size is None else "*i16"
                types["y"] = "*fp32" if x == "fp32" else "*bf16"
                constants = weight.constants(x == "i8", tiles)
                if x != "i8":
                    constants |= {"step": None, "sums": None}
                name = f"multiply {x} {levels} groups of {group_size} {scaling} {tiles}"
                yield name, gpu_kernels.multiply, types, constants


def main() -> int:
    torch.manual_seed(0)
    bad = 0
    for capability in (80, 90):
        for name, kernel, types, constants in variants():
            stack, registers, shared = compiled(kernel, types, dict(constants), capability)
            fine = stack <= STACK and shared <= SHARED
            bad += not fine
            print(
                f"sm_{capability} {name}: {registers} registers, {stack} bytes of stack, "
                f"{shared} bytes shared{'' if fine else '  <-- too much'}",
                flush=True,
            )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
