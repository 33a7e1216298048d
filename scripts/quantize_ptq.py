"""Quantize a model without training: search, GPTQ and static activation steps; pack and save it.

    python scripts/quantize_ptq.py --output_dir runs/smollm2-w4
    python scripts/quantize_ptq.py --model A --weight_levels 8 --group_size 64 \
        --dataset Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1 \
        --max_eval_windows 24 --metrics results/ptq-8.json

Prints the perplexity of the float and of the packed model on the same windows, side by side.
--output_dir keeps the model, with metrics.json; --metrics writes the measurements anywhere. A model
is an id on the Hub, a folder, or the name of a model inside a package (`maqd_hf.data.bundled`).
Norms stay per token: static ones need training (scripts/qat_llm.py).
"""

if not __package__:  # run as a file: scripts/__init__.py has not done it
    import torch_environment  # noqa: F401  (before torch)

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

from maqd_hf import MaQDConfig, pack_model, quantize_model
from maqd_hf.calibration import calibrate
from maqd_hf.checkpoint.saving import save_model
from maqd_hf.data.bundled import SMOLLM2, resolve_model
from maqd_hf.data.text import EMBEDDED, load_text, spread_samples, tokenize_blocks
from maqd_hf.evaluation.perplexity import PerplexityResult, text_perplexity
from maqd_hf.evaluation.versions import package_versions


@dataclass
class Arguments:
    """Command line."""

    model: str = field(
        default=EMBEDDED, metadata={"help": "Id, folder, an embedded model's name or 'embedded'."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder of the packed model and its metrics.json."}
    )
    metrics: str | None = field(default=None, metadata={"help": "Write the results as JSON here."})

    weight_levels: int = field(default=16, metadata={"help": "Levels, not bits: 16 is 4 bit."})
    group_size: int | None = field(
        default=64, metadata={"help": "Inputs that share a scale; 0: one scale per row."}
    )
    activation_levels: int | None = field(default=None, metadata={"help": "255 is 8 bit."})
    activation_scaling: Literal["static", "token", "group"] = "static"
    embedding_levels: int | None = field(default=None, metadata={"help": "Embedding and head."})
    gptq: bool = field(default=True, metadata={"help": "false: nearest codes on a searched grid."})

    dataset: str = field(
        default=EMBEDDED, metadata={"help": "Calibration: 'embedded', a file, a folder, a Hub id."}
    )
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    text_column: str | None = field(default=None, metadata={"help": "Default: the obvious one."})
    join: str | None = field(
        default=None, metadata={"help": "Put between rows that are lines of one text."}
    )
    samples: int = 16
    sample_tokens: int = 512
    batch_size: int | None = field(
        default=None, metadata={"help": "Default: what fits in 256 MiB."}
    )
    seed: int = 0

    eval_dataset: str | None = field(default=None, metadata={"help": "Default: --dataset."})
    eval_split: str = "test"
    window: int = 512
    max_eval_windows: int | None = field(default=None, metadata={"help": "0: no evaluation."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = field(default=None, metadata={"help": "Default: a GPU if there is one."})


def calibration_ids(args: Arguments, tokenizer: Any) -> Tensor:
    """The ids (samples, sample_tokens) to calibrate on, spread evenly over the text."""
    text = load_text(
        args.dataset,
        split=args.dataset_split,
        column=args.text_column,
        config_name=args.dataset_config_name,
        join=args.join,
    )
    blocks = tokenize_blocks(text, tokenizer, args.sample_tokens)
    return spread_samples(blocks, args.samples)


def measure(args: Arguments, model: Any, tokenizer: Any) -> PerplexityResult | None:
    """The perplexity of ``model``, unless no evaluation is wanted."""
    if args.max_eval_windows == 0:
        return None
    texts = load_text(
        args.eval_dataset or args.dataset,
        split=args.eval_split,
        column=args.text_column,
        config_name=args.dataset_config_name,
    )
    return text_perplexity(
        model,
        tokenizer,
        (row["text"] for row in texts),
        args.window,
        join="\n\n" if args.join is None else args.join,
        max_windows=args.max_eval_windows,
        progress=True,
    )


def describe(result: PerplexityResult | None) -> dict[str, Any] | None:
    """A measurement as plain JSON values."""
    return None if result is None else {"perplexity": result.perplexity, **asdict(result)}


def quantize(args: Arguments, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Quantize, calibrate and pack ``model`` in place; returns how that went."""
    config = MaQDConfig(
        weight_levels=args.weight_levels,
        group_size=args.group_size or None,
        activation_levels=args.activation_levels,
        activation_scaling=args.activation_scaling,
        embedding_levels=args.embedding_levels,
        layer_batch_norm=False,
    )
    began, began_cpu = time.perf_counter(), time.process_time()
    quantize_model(model, config, start="range" if args.gptq else "search")  # GPTQ searches
    ids = calibration_ids(args, tokenizer)
    calibration = calibrate(model, ids, gptq_weights=args.gptq, batch_size=args.batch_size)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    report = pack_model(model)
    print(report)
    print(calibration)
    return {
        "calibration_tokens": ids.numel(),
        "quantization_seconds": seconds,
        "quantization_cpu_seconds": cpu_seconds,
        "threads": torch.get_num_threads(),
        "bits_per_weight": report.bits_per_weight,
        **calibration.summary(),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Quantize, measure before and after, and save; returns the metrics."""
    parser = HfArgumentParser(Arguments, description=__doc__)  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses(argv)
    set_seed(args.seed)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = resolve_model(SMOLLM2 if args.model == EMBEDDED else args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype)
    model.to(device).eval()
    before = measure(args, model, tokenizer)
    made = quantize(args, model, tokenizer)
    after = measure(args, model, tokenizer)
    metrics = {
        "arguments": {k: v for k, v in asdict(args).items() if k not in ("output_dir", "metrics")},
        **made,
        "float": describe(before),
        "quantized": describe(after),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "versions": package_versions(),
    }
    if before and after:
        print(f"perplexity: float {before.perplexity:.3f}   quantized {after.perplexity:.3f}")
        print(after.protocol)
    files = [Path(args.metrics)] if args.metrics else []
    if args.output_dir:
        save_model(model, args.output_dir, tokenizer)
        files.append(Path(args.output_dir) / "metrics.json")
        print(f"saved to {args.output_dir}")
    for file in files:
        file.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


if __name__ == "__main__":
    main()
