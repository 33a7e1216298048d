"""The speed of packed models beside whatever else could run them: one command, one JSON.

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

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from maqd_hf.data.bundled import SMOLLM2, embedded_text, resolve_model
from maqd_hf.decoding.forward import CACHE_NAME
from maqd_hf.evaluation.versions import package_versions
from scripts.bench.report.targets import speed_targets
from scripts.bench.speed_kernels import matrices
from scripts.bench.speed_models import (
    MIB,
    NEW,
    PROMPT,
    by_length,
    compete,
    llama_cpp_sources,
    model_sources,
)
from scripts.bench.speed_rivals import PACKAGES, llama_cpp_build, unavailable


@dataclass
class Arguments:
    """Command line."""

    threads: list[int] = field(default_factory=lambda: [1, 2])
    tokens: list[int] = field(default_factory=lambda: [1, 8, 512])
    rounds: int = field(default=7, metadata={"help": "Turns that every competitor takes."})
    tables: list[str] = field(
        default_factory=lambda: ["matrices", "models", "lengths", "compiled", "agreement"]
    )
    busy: int = field(default=0, metadata={"help": "Processes that compute beside `models`."})
    large: bool = field(default=False, metadata={"help": "Also a random Llama of 1 B parameters."})
    output: str | None = None


# ------------------------------------------------------------------------------- whole models


def models(args: Arguments, sources: dict[str, Any], label: str, busy: int) -> list[dict[str, Any]]:
    """The rows of the table ``models`` for these competitors, beside ``busy`` other processes."""
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


def lengths(args: Arguments, sources: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table ``lengths``: 4 bits in groups of 64 every way, and what else runs."""
    kind, source, options = sources["maqd 4 bit g64, 8-bit head"]
    _, plain, _ = sources["transformers bf16"]
    chosen = {
        "transformers float32": ("hf", plain, {"native": None, "dtype": "float32"}),
        "maqd 4 bit g64": (kind, source, options),
        "maqd 4 bit g64, keys and values in 8 bits": (kind, source, options | {"kv_cache": "int8"}),
        "maqd 4 bit g64, the model's own forward": (kind, source, options | {"native": False}),
        **{name: s for name, s in sources.items() if name.startswith("llama.cpp")},
    }
    threads = max(args.threads)
    rows = []
    for name, seconds in by_length(chosen, threads, args.rounds).items():
        rows.append({"name": name, "threads": threads, "seconds": seconds})
        print(name, {order: round(1000 * s, 1) for order, s in seconds.items()})
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
    """The rows of the table ``compiled``."""
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
    """The seconds that importing torch and transformers takes in a process of its own."""
    began = time.perf_counter()
    code = "import torch; from transformers import AutoModelForCausalLM, LlamaForCausalLM"
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - began


@torch.no_grad()
def agreement(activation_levels: int | None, prompts: int = 50, new: int = 32) -> dict[str, Any]:
    """Compare the greedy text of the native decode step with that of the model's own forward.

    Both agree up to float rounding, which moves a quantized activation to its next code now and
    then; from there on they differ by as much as quantization does anyway. Where texts part, the
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
    """A model of about 1.0 B parameters with the proportions of today's small models."""
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )


Keep = Callable[[str, list[dict[str, Any]]], None]
"""Puts the rows of a table, by its name, into the report and its file."""


def whole_models(args: Arguments, report: dict[str, Any], keep: Keep) -> None:
    """Fill the tables of whole models that are asked for."""
    with tempfile.TemporaryDirectory() as folder:
        if {"models", "lengths", "compiled"} & set(args.tables) or args.busy:
            float_model = str(resolve_model(SMOLLM2))
            config = AutoConfig.from_pretrained(float_model)
            sources = model_sources(Path(folder), config, float_model)
        if "compiled" in args.tables:
            keep("compiled", compiled(args, sources))
        if {"models", "lengths"} & set(args.tables) or args.busy:
            sources |= llama_cpp_sources(Path(folder))
        if "lengths" in args.tables:
            keep("lengths", lengths(args, sources))
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


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Fill the tables that are asked for, print them and write the report."""
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
    whole_models(args, report, keep)
    for target in speed_targets(report):
        print(" | ".join(target.cells()))
    return report


if __name__ == "__main__":
    main()
