"""Layer-Batch Normalization at every mini-batch size, in models trained from scratch.

    python -m scripts.experiments.lbn_batch_size --data-dir FOLDER  # text; for the ViT, CIFAR-10
    python -m scripts.experiments.lbn_batch_size  # embedded text, without the ViT

Every row trains one small float model (only its norms differ) on the same samples in the same
order, 1, 2, 8 or 32 to an optimizer step, and evaluates it as it would be used:

- ``float``: the model as transformers builds it;
- ``lbn``: every norm, the final one too, is a Layer-Batch Normalization from the first step on, and
  evaluated with its running average: one constant per norm, nothing is reduced;
- ``lbn, final float``: the same, but the final norm stays per token (the package's default);
- ``lbn, fixed end``: as ``lbn``, and for the last 40 % of the steps the norms are fixed;
- ``lbn, eased in``: the same, and over the first 40 % the statistics of each token give way to the
  pooled ones, as a pretrained model's do;
- ``batch``: every norm is a Batch Normalization over the tokens of the whole mini-batch.

All rows see equally many samples, not steps: a step of 32 samples costs as much as 32 steps of one,
so this is what a user with a fixed budget would do. The learning rate is that of batch size 8 times
sqrt(batch size / 8), the usual rule for Adam, equal for all norms; where other ``--rates`` were
tried too, the best one of each norm and size counts. ``trained`` is the loss with the statistics of
training (pooled over each sample, or over the mini-batch), ``loss`` the one that counts. Results go
to a JSON file after every row, and rows found there are not repeated.

The static norms of GPT-2 lie between -0.02 and +0.02 nats of the float norm at every batch size
(notebook: "Layer-Batch Normalization and the mini-batch size", "Learning rates of static norms from
scratch").

``FOLDER`` holds the texts of ``SOURCES`` and ``cifar10/train.parquet``.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    get_cosine_schedule_with_warmup,
)

from maqd_hf import MaQDConfig, quantize_model
from maqd_hf.data.text import load_text
from maqd_hf.models.finding import gated_norms
from maqd_hf.models.probing import looks_like_norm
from maqd_hf.models.surgery import replace_module
from maqd_hf.training.callbacks import GateSchedule
from scripts.bench.report.targets import at_best_rate, batch_size_targets

FAMILIES = ("gpt2", "llama", "bert", "vit")
BLOCK = 128  # bytes to a sample
FIXED_END = ("lbn, fixed end", "lbn, eased in")
EASING = GateSchedule(0.0, 0.4)
SOURCES = ("text/tinyshakespeare.txt", "tinystories", "imdb/train.parquet", "wiki-sample")

# ------------------------------------------------------------------------------ models and data


def build(family: str) -> PreTrainedModel:
    """A fresh small model: 3 layers of width 128, without dropout."""
    size: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    text: dict[str, Any] = {"vocab_size": 256, "max_position_embeddings": BLOCK}
    still: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**size, **text, tie_word_embeddings=True))
    if family == "bert":
        classes: dict[str, Any] = {"num_labels": len(SOURCES)}
        config = BertConfig(**size, **text, **still, **classes)
        return BertForSequenceClassification(config)
    if family == "vit":
        picture: dict[str, Any] = {"image_size": 32, "patch_size": 4, "num_labels": 10}
        return ViTForImageClassification(ViTConfig(**size, **still, **picture))
    shape: dict[str, Any] = {"n_positions": BLOCK, "n_embd": 128, "n_layer": 3, "n_head": 4}
    shape |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_inner": 256}
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=256, **shape, **ids))


Batch = dict[str, Tensor]


@dataclass
class Samples:
    """Model inputs, one row a sample, to train and to evaluate on."""

    train: Batch
    evaluation: Batch


def blocks_of(rows: list[str], most: int) -> Tensor:
    """The first ``most`` bytes of a text in blocks, (blocks, ``BLOCK``)."""
    text = "\n".join(rows).encode()[:most]
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)


def byte_samples(data_dir: Path | None) -> Samples:
    """Blocks of a text, to predict its bytes; every tenth is kept for evaluation, 256 at most."""
    source = "embedded" if data_dir is None else str(data_dir / SOURCES[0])
    ids = blocks_of(load_text(source)["text"], 4_000_000)
    held_out = torch.arange(len(ids)) % 10 == 9
    kept = held_out.nonzero()[:, 0]
    kept = kept[:: max(1, len(kept) // 256)][:256]
    train, held_out = ids[~held_out], ids[kept]
    return Samples(
        {"input_ids": train, "labels": train}, {"input_ids": held_out, "labels": held_out}
    )


def sources(data_dir: Path | None) -> Samples:
    """Blocks of four texts (or the longest embedded articles), to tell which one each is from."""
    if data_dir is None:
        longest = sorted(load_text("embedded")["text"], key=len)[-len(SOURCES) :]
        texts = [[article] for article in longest]
    else:
        texts = [load_text(str(data_dir / source))["text"] for source in SOURCES]
    parts = [blocks_of(rows, 1_000_000) for rows in texts]
    size = min(map(len, parts))
    ids = torch.cat([part[:size] for part in parts])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    ids, labels = ids[order], torch.arange(len(parts)).repeat_interleave(size)[order]
    kept = min(2000, len(ids) // 5)
    return Samples(
        {"input_ids": ids[kept:], "labels": labels[kept:]},
        {"input_ids": ids[:kept], "labels": labels[:kept]},
    )


def pictures(data_dir: Path, train: int, evaluation: int) -> Samples:
    """CIFAR-10, values -1 to 1; the first ``evaluation`` pictures of a fixed shuffle held out."""
    rows = Dataset.from_parquet(str(data_dir / "cifar10" / "train.parquet")).shuffle(seed=0)
    rows = rows.select(range(min(train + evaluation, len(rows)))).with_format("torch")
    pixels = torch.stack([row["image"] for row in rows]) / 127.5 - 1
    labels = torch.as_tensor(rows["label"][:])
    return Samples(
        {"pixel_values": pixels[evaluation:], "labels": labels[evaluation:]},
        {"pixel_values": pixels[:evaluation], "labels": labels[:evaluation]},
    )


# -------------------------------------------------------------------------------------- training


class TokenBatchNorm(nn.Module):
    """Batch Normalization of (batch, tokens, features): per feature, over all tokens there are."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features, momentum=0.05)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, -2)).view_as(x)


def set_norms(model: PreTrainedModel, family: str, norm: str) -> None:
    """Give a fresh model the norms of a row."""
    if norm == "batch":
        for name, module in list(model.named_modules()):
            if looks_like_norm(module):
                replace_module(model, name, TokenBatchNorm(module.weight.numel()))
    elif norm != "float":
        config = MaQDConfig(
            weight_levels=None,
            activation_levels=None,
            first_token="own" if family in ("gpt2", "llama") else "shared",
            lbn_pooling="mean",
            norm_affine="fold",  # a static norm then leaves nothing at all, the paper's claim
            lbn_final_norm=norm != "lbn, final float",
        )
        quantize_model(model, config)
        for module in gated_norms(model).values():
            module.gate.fill_(1.0)


@dataclass(frozen=True)
class Row:
    """One model to train."""

    family: str
    norm: str
    batch_size: int
    seed: int
    rate: float = 1.0

    @property
    def learning_rate(self) -> float:
        """1e-3 at 8 samples to a step, times ``rate``."""
        return self.rate * float(1e-3 * (self.batch_size / 8) ** 0.5)

    @property
    def key(self) -> dict[str, Any]:
        """The values that tell a row of the results file from the others."""
        names = ("family", "norm", "batch_size", "seed", "learning_rate")
        return {name: getattr(self, name) for name in names}


def train(row: Row, data: Samples, samples: int) -> dict[str, float]:
    """Train the model of ``row`` on ``samples`` samples and return what was measured."""
    torch.manual_seed(row.seed)
    model = build(row.family)
    set_norms(model, row.family, row.norm)
    count = len(data.train["labels"])
    passes = [torch.randperm(count) for _ in range(-(-samples // count))]
    order = torch.cat(passes)[:samples]
    steps = samples // row.batch_size
    optimizer = torch.optim.AdamW(
        model.parameters(), row.learning_rate, weight_decay=0.01, fused=True
    )
    decay = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    title = f"{row.family}, {row.norm}, {row.batch_size} a step"
    batches = order.split(row.batch_size)[:steps]
    norms = gated_norms(model).values()
    for step, chosen in enumerate(tqdm(batches, desc=title, leave=False, disable=None)):
        fixed = row.norm in FIXED_END and step >= int(0.6 * steps)
        for norm in norms:
            norm.fixed = fixed
            if row.norm == "lbn, eased in":
                norm.gate.fill_(EASING.gate(step, steps))
        model(**{name: rows[chosen] for name, rows in data.train.items()}).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    pooled = row.batch_size if row.norm == "batch" else 32  # the others know one sample only
    trained = evaluate(model, data.evaluation, pooled)["loss"]
    for name, buffer in model.named_buffers():  # evaluating in training mode moved averages
        buffer.copy_(buffers[name])
    model.eval()
    return {"trained": trained, **evaluate(model, data.evaluation, 32)}


@torch.no_grad()
def evaluate(model: PreTrainedModel, data: Batch, batch_size: int) -> dict[str, float]:
    """The mean loss in nats and the share of right classes, in the mode the model is in."""
    losses = counted = right = 0.0
    for start in range(0, len(data["labels"]), batch_size):
        batch = {name: rows[start : start + batch_size] for name, rows in data.items()}
        output, labels = model(**batch), batch["labels"]
        causal = isinstance(model, (GPT2LMHeadModel, LlamaForCausalLM))
        tokens = int(((labels[:, 1:] if causal else labels) != -100).sum())
        losses, counted = losses + float(output.loss) * tokens, counted + tokens
        if labels.dim() == 1:
            right += int((output.logits.argmax(-1) == labels).sum())
    accuracy = {"accuracy": right / counted} if data["labels"].dim() == 1 else {}
    return {"loss": losses / counted, **accuracy}


# ------------------------------------------------------------------------------------- the whole


@dataclass
class Arguments:
    """Command line."""

    data_dir: Path | None = field(
        default=None, metadata={"help": "See above; without it the embedded text is used."}
    )
    results: Path = field(
        default=Path("results/lbn_batch.json"),
        metadata={"help": "JSON; rows it already holds are not repeated."},
    )
    families: list[str] = field(default_factory=lambda: list(FAMILIES))
    norms: list[str] = field(default_factory=lambda: ["float", "lbn"])
    batch_sizes: list[int] = field(default_factory=lambda: [32, 8, 2, 1])
    seeds: list[int] = field(default_factory=lambda: [0])
    rates: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Learning rates, times the rule's."}
    )
    text_samples: int = field(default=4096, metadata={"help": "Blocks of 128 bytes a row sees."})
    pictures: int = field(default=8192, metadata={"help": "Pictures a row of the ViT sees."})
    held_out_pictures: int = field(default=5000, metadata={"help": "Pictures to evaluate on."})


def load(family: str, arguments: Arguments) -> Samples | None:
    """The data of a family, or None where it needs a folder that was not given."""
    if family == "bert":
        return sources(arguments.data_dir)
    if family != "vit":
        return byte_samples(arguments.data_dir)
    if arguments.data_dir is None:
        print("vit skipped: it needs --data-dir")
        return None
    return pictures(arguments.data_dir, arguments.pictures, arguments.held_out_pictures)


def table(rows: list[dict[str, Any]]) -> str:
    """The means over the seeds as text, a column for each batch size.

    They are losses in nats, with accuracies in per cent for classifiers.
    """
    rows = at_best_rate(rows)
    sizes = sorted({row["batch_size"] for row in rows})
    lines = ["".join(f"{title:>18}" for title in ("family", "norm", *map(str, sizes)))]
    for family, norm in dict.fromkeys((row["family"], row["norm"]) for row in rows):
        cells = []
        for size in sizes:
            key = {"family": family, "norm": norm, "batch_size": size}
            found = [row for row in rows if key.items() <= row.items()]
            cell = ""
            if found:
                cell = f"{mean(row['loss'] for row in found):.3f}"
            if found and "accuracy" in found[0]:
                cell = f"{100 * mean(row['accuracy'] for row in found):.2f} % {cell}"
            cells.append(cell)
        lines.append("".join(f"{cell:>18}" for cell in (family, norm, *cells)))
    return "\n".join(lines)


def main(arguments: Arguments) -> list[dict[str, Any]]:
    """Train what the results file does not hold yet, write it after every row, print the table."""
    path = arguments.results
    rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = "embedded" if arguments.data_dir is None else arguments.data_dir.name
    loaded = {family: load(family, arguments) for family in arguments.families}
    wanted = [
        Row(family, norm, size, seed, rate)
        for seed in arguments.seeds
        for rate in arguments.rates
        for size in arguments.batch_sizes
        for family in arguments.families
        for norm in arguments.norms
    ]
    for row in wanted:
        data = loaded[row.family]
        if data is None:
            continue
        samples = arguments.pictures if row.family == "vit" else arguments.text_samples
        key = {**row.key, "samples": samples, "data": folder}
        if any(key.items() <= known.items() for known in rows):
            continue
        began = time.perf_counter()
        measured = train(row, data, samples)
        seconds = round(time.perf_counter() - began)
        steps = samples // row.batch_size
        rows.append({**key, "steps": steps, **measured, "seconds": seconds})
        path.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
        print(rows[-1], flush=True)
    print(table(rows))
    for target in batch_size_targets(rows):
        print(" | ".join(target.cells()))
    return rows


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    main(parsed)
