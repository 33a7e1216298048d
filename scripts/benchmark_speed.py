"""How fast packed models run, beside what else could run them: one command, one JSON.

    python scripts/benchmark_speed.py --output results/speed.json
    python scripts/benchmark_speed.py --threads 1 2 --busy 2 --large

Three tables. `matrices`: one packed layer against torch in bfloat16, torch's int4 product and
onnxruntime's MatMulNBits, for 1, 8 and 512 tokens. `models`: SmolLM2-135M (random codes of the same
shapes cost the same, so no calibration is done) through `generate()` and in one prefill of 512
tokens, against transformers in bfloat16 and llama.cpp. `large`: a random Llama of 1 B parameters.
`agreement`: what the native decode step and the model's own forward write after 50 prompts. All
competitors of a table take turns in one run, and medians and ratios are printed: the machine may be
shared. `--busy N` repeats `models`, with the last thread count and half the rounds, beside N
processes that compute without end. Tables that are not asked for stay in the output as they are.
Rivals come with `pip install maqd_hf[bench]`; a missing one is named.
"""

import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
)
from transformers.utils import logging

from maqd_hf import MaQDConfig, kernels, pack_model, quantize_model, use_native
from maqd_hf.embedded import SMOLLM2, embedded_gguf, embedded_text, resolve_model
from maqd_hf.nn import LinearSpec, MaQDLinear, PackedLinear
from maqd_hf.versions import package_versions

SHAPES = [(1536, 576), (2048, 2048), (4096, 4096), (11008, 4096)]
RIVALS = {"llama_cpp": "llama-cpp-python", "onnxruntime": "onnxruntime", "onnx": "onnx"}
LLAMA_CPP = {"Q8_0": 7, "Q4_0": 2, "TQ2_0": 37}  # llama.cpp's numbers of its file types
PROMPT, NEW, PREFILL = 16, 64, 512
MIB = 2**20


@dataclass
class Arguments:
    threads: list[int] = field(default_factory=lambda: [1, 2])
    tokens: list[int] = field(default_factory=lambda: [1, 8, 512])
    rounds: int = field(default=7, metadata={"help": "Turns that every competitor takes."})
    tables: list[str] = field(default_factory=lambda: ["matrices", "models", "agreement"])
    busy: int = field(default=0, metadata={"help": "Processes that compute beside `models`."})
    large: bool = field(default=False, metadata={"help": "Also a random Llama of 1 B parameters."})
    output: str | None = None


# ---------------------------------------------------------------------------------- one matrix


def read_bandwidth(rounds: int) -> float:
    """Bytes per second of reading memory beyond all caches, with torch's threads."""
    data = torch.ones(64 * MIB, dtype=torch.int64)  # 512 MiB
    seconds = take_turns({"read": lambda: data.sum()}, rounds)["read"]
    return data.nbytes / statistics.median(seconds)


def take_turns(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
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


def packed_layer(rows: int, columns: int, levels: int, group_size: int | None) -> PackedLinear:
    spec = LinearSpec(levels, 255, "token", group_size=group_size)
    linear = nn.Linear(columns, rows, bias=False)
    return PackedLinear.from_qat(MaQDLinear.from_linear(linear, spec, start="range"))


def matrix_competitors(rows: int, columns: int, x: Tensor) -> dict[str, Callable[[], Any]]:
    """One layer in every way at hand, each a call without arguments."""
    calls: dict[str, Callable[[], Any]] = {}
    for levels, group_size in ((4, None), (4, 64), (16, None), (16, 64), (256, None)):
        bits = {4: 2, 16: 4, 256: 8}[levels]
        name = f"maqd {bits} bit" + (f", groups of {group_size}" if group_size else "")
        calls[name] = partial(packed_layer(rows, columns, levels, group_size), x)
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


@torch.no_grad()
def matrices(args: Arguments) -> list[dict[str, Any]]:
    rows_found = []
    bandwidth = read_bandwidth(args.rounds)
    for rows, columns in SHAPES:
        for tokens in args.tokens:
            x = torch.randn(tokens, columns)
            seconds = take_turns(matrix_competitors(rows, columns, x), args.rounds)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            for name, median in medians.items():
                row: dict[str, Any] = {"rows": rows, "columns": columns, "tokens": tokens}
                row |= {"name": name, "threads": torch.get_num_threads()}
                row |= {"seconds": median, "to_bf16": medians["torch bf16"] / median}
                if name.startswith("maqd"):
                    read = rows * columns * int(name.split()[1]) / 8
                    row["of_read_bandwidth"] = read / median / bandwidth
                rows_found.append(row)
                print(f"{rows:>6}x{columns:<6}{tokens:>4}  {name:34}{median * 1e6:>12.1f} us "
                      f"{row['to_bf16']:>8.2f}x bf16")  # fmt: skip
    rows_found.append({"name": "read bandwidth", "bytes_per_second": bandwidth})
    return rows_found


# ------------------------------------------------------------------------------- whole models


class TransformersModel:
    """``generate()`` and ``forward`` of a folder or configuration."""

    def __init__(self, source: str, native: bool | None, dtype: str) -> None:
        began = time.perf_counter()
        self.model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        if native is not None:
            use_native(self.model, native)
        self.load_seconds = time.perf_counter() - began
        self.model.generation_config.eos_token_id = None  # nobody stops early
        vocabulary = self.model.config.vocab_size
        self.ids = torch.randint(5, vocabulary, (1, PREFILL), generator=torch.Generator())

    @torch.no_grad()
    def prefill(self) -> None:
        self.model(self.ids, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def decode(self, new: int) -> None:
        prompt = self.ids[:, :PROMPT]
        options = {"max_new_tokens": new, "do_sample": False}
        self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


class LlamaCpp:
    """llama.cpp on a GGUF file, token by token with the largest logit, without its sampler."""

    def __init__(self, source: str, threads: int) -> None:
        import llama_cpp

        began = time.perf_counter()
        self.model = llama_cpp.Llama(
            source, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads,
            verbose=False,
        )  # fmt: skip
        self.load_seconds = time.perf_counter() - began
        self.logits = partial(llama_cpp.llama_get_logits, self.model.ctx)
        self.vocabulary = self.model.n_vocab()
        self.ids = torch.randint(5, self.vocabulary, (PREFILL,)).tolist()

    def prefill(self) -> None:
        self.model.reset()
        self.model.eval(self.ids)

    def decode(self, new: int) -> None:
        import numpy as np

        self.model.reset()
        tokens = self.ids[:PROMPT]
        for _ in range(new):
            self.model.eval(tokens)
            logits = np.ctypeslib.as_array(self.logits(), shape=(self.vocabulary,))
            tokens = [int(logits.argmax())]


def rss(which: str) -> int:
    """Bytes of memory of this process, "VmRSS" (now) or "VmHWM" (at most); 0 where unknown."""
    status = Path("/proc/self/status")
    return int(status.read_text().split(f"{which}:")[1].split()[0]) * 1024 if status.exists() else 0


def serve(kind: str, source: str, options: dict[str, Any], pipe: Connection) -> None:
    """A competitor in a process of its own: does what the pipe asks, answers with seconds."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threads = options.pop("threads")
    torch.set_num_threads(threads)
    before = rss("VmRSS")
    if kind == "llama.cpp":
        runner: Any = LlamaCpp(source, threads)
    else:
        runner = TransformersModel(source, **options)
    runner.decode(2)
    pipe.send({"load_seconds": runner.load_seconds, "peak_bytes": rss("VmHWM") - before})
    while (order := pipe.recv()) is not None:
        began = time.perf_counter()
        if order == "prefill":
            runner.prefill()
        else:
            runner.decode(NEW if order == "decode" else 1)
        pipe.send(time.perf_counter() - began)


def burn() -> None:
    """Keep a core busy."""
    x = torch.randn(64, 64)
    torch.set_num_threads(1)
    while True:
        x = (x @ x).clamp(-1, 1)


def model_sources(folder: Path, config: Any, float_model: str | None) -> dict[str, Any]:
    """name -> (kind, source, options) of every competitor; files are made in ``folder``."""
    if float_model is None:
        float_model = str(folder / "float")
        build(config).bfloat16().save_pretrained(float_model)
    found: dict[str, Any] = {
        "transformers bf16": ("hf", float_model, {"native": None, "dtype": "bfloat16"})
    }
    for levels, head, name in ((4, 255, "2 bit, 8-bit head"), (16, 255, "4 bit, 8-bit head"),
                               (4, 16, "2 bit, 4-bit head")):  # fmt: skip
        target = folder / f"w{levels}h{head}"
        model = build(config)
        settings = MaQDConfig(
            weight_levels=levels, embedding_levels=head, activation_scaling="token"
        )
        quantize_model(model, settings, start="range")
        pack_model(model)
        model.save_pretrained(target)
        found[f"maqd {name}"] = ("hf", str(target), {"native": True, "dtype": "float32"})
        if head == 255:
            own = {"native": False, "dtype": "float32"}
            found[f"maqd {name}, the model's own forward"] = ("hf", str(target), own)
    return found


def build(config: Any) -> Any:
    """A model with random weights; rotary tables and norms as they are."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)


def llama_cpp_sources(folder: Path) -> dict[str, Any]:
    """The embedded GGUF file requantised to llama.cpp's types."""
    if not find_spec("llama_cpp"):
        return {}
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    found: dict[str, Any] = {}
    for name, number in LLAMA_CPP.items():
        target = folder / f"{name}.gguf"
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize, options.nthread = number, True, 2
        source = str(embedded_gguf()).encode()
        if llama_cpp.llama_model_quantize(source, str(target).encode(), options) == 0:
            found[f"llama.cpp {name}"] = ("llama.cpp", str(target), {})
    return found


def compete(
    sources: dict[str, Any], threads: int, rounds: int, busy: int
) -> dict[str, dict[str, Any]]:
    """All competitors in turn, each in its own process: medians of what they did."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    spawn = get_context("spawn")
    pipes, results = {}, {}
    others = [spawn.Process(target=burn, daemon=True) for _ in range(busy)]
    for name, (kind, source, options) in sources.items():
        pipes[name], theirs = spawn.Pipe()
        job = (kind, source, {**options, "threads": threads}, theirs)
        spawn.Process(target=serve, args=job, daemon=True).start()
        theirs.close()
        results[name] = pipes[name].recv()
    for process in others:
        process.start()
    times: dict[str, dict[str, list[float]]] = {name: {} for name in pipes}
    for turn in range(rounds + 1):
        for order in ("prefill", "first", "decode"):
            for name, pipe in pipes.items():
                pipe.send(order)
                seconds = pipe.recv()
                if turn:  # the first one warms up
                    times[name].setdefault(order, []).append(seconds)
    for process in others:
        process.kill()
    for name, pipe in pipes.items():
        pipe.send(None)
        medians = {order: statistics.median(values) for order, values in times[name].items()}
        results[name] |= {
            "prefill_tokens_per_second": PREFILL / medians["prefill"],
            "first_token_seconds": medians["first"],
            "tokens_per_second": (NEW - 1) / (medians["decode"] - medians["first"]),
        }
    return results


def models(args: Arguments, sources: dict[str, Any], label: str, busy: int) -> list[dict[str, Any]]:
    rows = []
    for threads in args.threads:
        results = compete(sources, threads, args.rounds, busy)
        plain = results["transformers bf16"]["tokens_per_second"]
        for name, result in results.items():
            row = {"model": label, "name": name, "threads": threads, "busy": busy, **result}
            row["to_bf16"] = row["tokens_per_second"] / plain
            rows.append(row)
            print(
                f"{label}, {threads} thread(s), {busy} busy  {name:44}"
                f"{row['tokens_per_second']:>8.1f} tokens/s ({row['to_bf16']:.2f}x bf16) "
                f"{row['prefill_tokens_per_second']:>8.0f} prefill "
                f"{row['first_token_seconds'] * 1e3:>7.1f} ms to the first token, load "
                f"{row['load_seconds']:.2f} s, {row['peak_bytes'] / MIB:.0f} MiB"
            )
    return rows


@torch.no_grad()
def agreement(activation_levels: int | None, prompts: int = 50, new: int = 32) -> dict[str, Any]:
    """Greedy text of the native decode step beside that of the model's own forward.

    Both agree up to float rounding, which moves a quantised activation to its next code now and
    then; from there on they differ by as much as quantisation does anyway. Where texts part, the
    gap between the two largest logits says how near the choice was.
    """
    path = resolve_model(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    settings = MaQDConfig(activation_levels=activation_levels, activation_scaling="token")
    quantize_model(model, settings)
    pack_model(model)
    gaps = []
    for row in tqdm(list(embedded_text())[:prompts], desc="agreement"):
        ids = tokenizer(row["text"], return_tensors="pt").input_ids[:, :PROMPT]
        options = {"max_new_tokens": new, "do_sample": False, "attention_mask": ids > -1}
        use_native(model, True)
        got = model.generate(ids, **options)[0].tolist()
        use_native(model, False)
        out = model.generate(ids, **options, output_logits=True, return_dict_in_generate=True)
        expected = out.sequences[0].tolist()
        pairs = enumerate(zip(got, expected, strict=False))
        parted = next((i for i, (a, b) in pairs if a != b), None)
        if parted is not None:
            best = out.logits[parted - ids.shape[1]][0].topk(2).values
            gaps.append(float(best[0] - best[1]))
    result = {"activation_levels": activation_levels, "prompts": prompts, "new_tokens": new}
    print(f"{activation_levels} activation levels: {prompts - len(gaps)} of {prompts} texts equal")
    return {**result, "equal": prompts - len(gaps), "gaps": gaps}


def large_config() -> LlamaConfig:
    """About 1.0 B parameters, of the proportions of today's small models."""
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = HfArgumentParser(Arguments, description=__doc__)  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses(argv)
    missing = [package for module, package in RIVALS.items() if not find_spec(module)]
    for package in missing:
        print(f"rival missing: {package} (pip install maqd_hf[bench])")
    output = Path(args.output) if args.output else None
    report: dict[str, Any] = json.loads(output.read_text()) if output and output.exists() else {}
    report |= {
        "arguments": asdict(args),
        "kernels": kernels.info(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "missing_rivals": missing,
        "versions": package_versions(),
    }

    def keep(table: str, rows: list[dict[str, Any]]) -> None:
        report[table] = rows
        if output:
            output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    if "agreement" in args.tables:
        keep("agreement", [agreement(levels) for levels in (None, 255)])
    if "matrices" in args.tables:
        torch.set_num_threads(max(args.threads))
        keep("matrices", matrices(args))
    with tempfile.TemporaryDirectory() as folder:
        if "models" in args.tables:
            float_model = str(resolve_model(SMOLLM2))
            config = AutoConfig.from_pretrained(float_model)
            sources = model_sources(Path(folder), config, float_model)
            sources |= llama_cpp_sources(Path(folder))
            rows = models(args, sources, SMOLLM2, 0)
            keep("models", rows)
            if args.busy:
                crowded = replace(args, threads=args.threads[-1:], rounds=max(1, args.rounds // 2))
                keep("models", rows + models(crowded, sources, SMOLLM2, args.busy))
        if args.large:
            place = Path(folder) / "large"
            place.mkdir()
            sources = model_sources(place, large_config(), None)
            keep("large", models(args, sources, "random Llama, 1 B", 0))
    return report


if __name__ == "__main__":
    main()
