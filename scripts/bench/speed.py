"""How fast packed models run, beside what else could run them: one command, one JSON.

    python -m scripts.bench.speed --output results/speed.json
    python -m scripts.bench.speed --threads 1 2 --busy 2 --large

Tables. `matrices`: one packed layer against torch in bfloat16, torch's int4 product, onnxruntime's
MatMulNBits, OpenVINO, auto-round-lib and llama.cpp's product, for 1, 8 and 512 tokens, with the
bandwidth and the multiplications the machine reaches in the same run (``report.plots`` draws them).
`models`: SmolLM2-135M (random codes of the same shapes cost the same, so no calibration is done)
through `generate()`, one stream and eight, and in one prefill of 512 tokens, against transformers
in bfloat16 and llama.cpp. `compiled`: decoding under torch.compile with a static cache. `large`: a
random Llama of 1 B parameters. `agreement`: what the native decode step and the model's own forward
write after 50 prompts. All competitors of a table take turns in one run, and medians and ratios are
printed: the machine may be shared. `--busy N` runs the native decode step and llama.cpp once more,
with the last thread count and half the rounds, beside N processes that compute without end (torch's
own threads spin there, and are not waited for). Tables that are not asked for stay in the output as
they are. Rivals come with `pip install maqd_hf[bench]`; one that is missing, or computes something
else, is named.
"""

import copy
import json
import os
import statistics
import subprocess
import sys
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
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaConfig,
    StaticCache,
)
from transformers.utils import logging

from maqd_hf import MaQDConfig, kernels, pack_model, quantize_model, use_native
from maqd_hf.data.bundled import SMOLLM2, embedded_gguf, embedded_text, resolve_model
from maqd_hf.decoding.forward import CACHE_NAME
from maqd_hf.evaluation.versions import package_versions
from scripts.bench.report.targets import speed_targets
from scripts.bench.speed_kernels import matrices
from scripts.bench.speed_rivals import PACKAGES, llama_cpp_build, unavailable

LLAMA_CPP = {"Q8_0": 7, "Q4_0": 2, "TQ2_0": 37}  # llama.cpp's numbers of its file types
MODELS: tuple[tuple[int, int | None, int, str], ...] = (  # levels, group, head's levels, name
    (3, None, 255, "ternary, 8-bit head"),
    (4, None, 255, "2 bit, 8-bit head"),
    (4, 64, 255, "2 bit g64, 8-bit head"),
    (4, None, 16, "2 bit, 4-bit head"),
    (16, None, 255, "4 bit, 8-bit head"),
    (16, 64, 255, "4 bit g64, 8-bit head"),
)
OWN = ("2 bit, 8-bit head", "4 bit, 8-bit head")  # also through the model's own forward
PROMPT, NEW, PREFILL, BATCH = 16, 64, 512, 8
MIB = 2**20


@dataclass
class Arguments:
    threads: list[int] = field(default_factory=lambda: [1, 2])
    tokens: list[int] = field(default_factory=lambda: [1, 8, 512])
    rounds: int = field(default=7, metadata={"help": "Turns that every competitor takes."})
    tables: list[str] = field(
        default_factory=lambda: ["matrices", "models", "compiled", "agreement"]
    )
    busy: int = field(default=0, metadata={"help": "Processes that compute beside `models`."})
    large: bool = field(default=False, metadata={"help": "Also a random Llama of 1 B parameters."})
    output: str | None = None


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
    def decode(self, new: int, batch: int = 1) -> None:
        prompt = self.ids[:, : PROMPT * batch].view(batch, PROMPT)
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


def warm_up(kind: str) -> None:
    """Import what the first model of a process makes its framework import, by loading a tiny float
    one and letting it write: seconds and memory are then those of the model that is measured."""
    if kind == "llama.cpp":
        import llama_cpp  # noqa: F401

        return
    sizes: dict[str, Any] = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(folder)
        TransformersModel(folder, None, "float32").decode(2)


def serve(kind: str, source: str, options: dict[str, Any], pipe: Connection) -> None:
    """A competitor in a process of its own: does what the pipe asks, answers with seconds."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threads = options.pop("threads")
    torch.set_num_threads(threads)
    warm_up(kind)
    before = rss("VmRSS")
    if kind == "llama.cpp":
        runner: Any = LlamaCpp(source, threads)
    else:
        runner = TransformersModel(source, **options)
    runner.decode(2)
    peak = rss("VmHWM") - before
    files = [Path(source)] if kind == "llama.cpp" else list(Path(source).glob("*.safetensors"))
    began = time.perf_counter()
    size = sum(len(file.read_bytes()) for file in files)
    read = time.perf_counter() - began
    pipe.send({"load_seconds": runner.load_seconds, "peak_bytes": peak,
               "file_bytes": size, "read_seconds": read})  # fmt: skip
    orders: dict[str, Callable[[], None]] = {
        "prefill": runner.prefill,
        "first": partial(runner.decode, 1),
        "decode": partial(runner.decode, NEW),
    }
    if kind != "llama.cpp":
        orders["first of 8"] = partial(runner.decode, 1, BATCH)
        orders["decode 8"] = partial(runner.decode, NEW, BATCH)
    while (order := pipe.recv()) is not None:
        began = time.perf_counter()
        if order in orders:
            orders[order]()
        pipe.send(time.perf_counter() - began if order in orders else None)


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
    for levels, group, head, name in MODELS:
        target = folder / name.replace(" ", "-").replace(",", "")
        model = build(config)
        settings = MaQDConfig(
            weight_levels=levels,
            group_size=group,
            embedding_levels=head,
            activation_scaling="token",
        )
        quantize_model(model, settings, start="range")
        pack_model(model)
        model.save_pretrained(target)
        found[f"maqd {name}"] = ("hf", str(target), {"native": True, "dtype": "float32"})
        if name in OWN:
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
    orders = ["prefill", "first", "decode", *([] if busy else ["first of 8", "decode 8"])]
    for turn in range(rounds + 1):
        for order in orders:
            for name, pipe in pipes.items():
                pipe.send(order)
                seconds = pipe.recv()
                if turn and seconds is not None:  # the first one warms up
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
        if "decode 8" in medians:
            seconds = medians["decode 8"] - medians["first of 8"]
            results[name]["batch_tokens_per_second"] = BATCH * (NEW - 1) / seconds
    return results


def models(args: Arguments, sources: dict[str, Any], label: str, busy: int) -> list[dict[str, Any]]:
    rows = []
    for threads in args.threads:
        results = compete(sources, threads, args.rounds, busy)
        plain = results.get("transformers bf16", {}).get("tokens_per_second")
        for name, result in results.items():
            row = {"model": label, "name": name, "threads": threads, "busy": busy, **result}
            if plain:
                row["to_bf16"] = row["tokens_per_second"] / plain
            rows.append(row)
            print(
                f"{label}, {threads} thread(s), {busy} busy  {name:44}"
                f"{row['tokens_per_second']:>8.1f} tokens/s ({row.get('to_bf16', 0):.2f}x bf16) "
                f"{row['prefill_tokens_per_second']:>8.0f} prefill "
                f"{row['first_token_seconds'] * 1e3:>7.1f} ms to the first token, load "
                f"{row['load_seconds']:.2f} s, {row['peak_bytes'] / MIB:.0f} MiB"
            )
    return rows


def compiled_decoding(source: str, dtype: str, threads: int, pipe: Connection) -> None:
    """Milliseconds a token under torch.compile with a static cache, in a process of its own."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    seconds = []
    with torch.no_grad():
        ids = torch.randint(5, 1000, (1, PROMPT))
        options: dict[str, Any] = {CACHE_NAME: StaticCache(config=model.config, max_cache_len=128)}
        options |= {"use_cache": True, "logits_to_keep": 1}
        token = model(ids, **options).logits[:, -1:].argmax(-1)
        step = torch.compile(model.forward, fullgraph=True, dynamic=False)
        for position in range(PROMPT, PROMPT + NEW):
            began = time.perf_counter()
            out = step(input_ids=token, position_ids=torch.tensor([[position]]), **options)
            token = out.logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - began)
    pipe.send({"compile_seconds": seconds[0], "token_seconds": statistics.median(seconds[5:])})


def compiled(args: Arguments, sources: dict[str, Any]) -> list[dict[str, Any]]:
    spawn, rows = get_context("spawn"), []
    threads = max(args.threads)
    for name in ("transformers bf16", "maqd 2 bit, 8-bit head"):
        _, source, options = sources[name]
        ours, theirs = spawn.Pipe()
        spawn.Process(
            target=compiled_decoding, args=(source, options["dtype"], threads, theirs), daemon=True
        ).start()
        theirs.close()
        rows.append({"name": name, "threads": threads, **ours.recv()})
        rows[-1]["to_bf16"] = rows[0]["token_seconds"] / rows[-1]["token_seconds"]
        print(f"compiled, static cache: {name:30}{1000 * rows[-1]['token_seconds']:>8.1f} ms a "
              f"token ({rows[-1]['to_bf16']:.2f}x bf16), "
              f"{rows[-1]['compile_seconds']:.0f} s to compile")  # fmt: skip
    return rows


def import_seconds() -> float:
    """What importing torch and transformers takes in a process of its own."""
    began = time.perf_counter()
    code = "import torch; from transformers import AutoModelForCausalLM, LlamaForCausalLM"
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


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
    missing = {package: why for package in PACKAGES if (why := unavailable(package))}
    for package, why in missing.items():
        print(f"rival missing: {package}, {why}")
    output = Path(args.output) if args.output else None
    report: dict[str, Any] = json.loads(output.read_text()) if output and output.exists() else {}
    report |= {
        "arguments": asdict(replace(args, output=None)),  # places mean nothing elsewhere
        "kernels": kernels.info(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "missing_rivals": missing,
        "llama_cpp_build": llama_cpp_build(),
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
        keep("matrices", matrices(args.tokens, args.rounds))
    with tempfile.TemporaryDirectory() as folder:
        if {"models", "compiled"} & set(args.tables) or args.busy:
            float_model = str(resolve_model(SMOLLM2))
            config = AutoConfig.from_pretrained(float_model)
            sources = model_sources(Path(folder), config, float_model)
        if "compiled" in args.tables:
            keep("compiled", compiled(args, sources))
        if "models" in args.tables or args.busy:
            sources |= llama_cpp_sources(Path(folder))
        if "models" in args.tables:
            report["import_seconds"] = import_seconds()
            keep("models", models(args, sources, SMOLLM2, 0))
        if args.busy:
            few = {name: s for name, s in sources.items() if name.startswith("llama.cpp")}
            few |= {name: s for name, s in sources.items() if name.endswith("head")}
            # how long the scheduler keeps a thread waiting differs from one turn to the next
            crowded = replace(args, threads=args.threads[-1:], rounds=2 * args.rounds)
            keep("busy", models(crowded, few, SMOLLM2, args.busy))
        if args.large:
            place = Path(folder) / "large"
            place.mkdir()
            sources = model_sources(place, large_config(), None)
            keep("large", models(args, sources, "random Llama, 1 B", 0))
    for target in speed_targets(report):
        print(" | ".join(target.cells()))
    return report


if __name__ == "__main__":
    main()
