"""The architectures of the installed transformers that convert, train, pack and load.

    python -m scripts.experiments.architectures  # all of them: some ten minutes
    python -m scripts.experiments.architectures --classes "Llama*" "Bert*"

Takes every class that transformers' auto classes know for causal or masked language models and for
classifying texts, in a tiny size and with random weights:

1. converted with float inputs, trained for one step and packed: its logits have to be those of the
   simulated model, up to rounding;
2. converted with 8-bit inputs (and the embedding too, where the class takes that), packed, saved
   and loaded with ``from_pretrained``: the logits have to be the packed model's, and ``generate()``
   has to run where the class has it.

A class is "refused" where ``quantize_model`` says that it does not take it, "failed" where anything
else raises, and "not tried" where the float model could not be made small, run or saved like this.
That a class works says nothing about what quantization costs it.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from logging import CRITICAL
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # some models ask the Hub for faster kernels

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from maqd_hf import MaQDConfig, pack_model, quantize_model
from maqd_hf.decoding import unsupported
from maqd_hf.evaluation.versions import package_versions

TASKS = {
    "causal language models": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked language models": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "text classifiers": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
VOCABULARY, TOKENS = 160, 12
MOST_WEIGHTS = 20_000_000
ROUNDING = 1e-4  # relative to the norm of the logits

# fmt: off
_WIDTH = (
    "hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim",
)
_DEPTH = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
)
_HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
    "decoder_attention_heads",
)
_INNER = (
    "intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner", "encoder_ffn_dim",
    "decoder_ffn_dim",
)
# fmt: on
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
SMALL: dict[str, int] = {
    **dict.fromkeys(_WIDTH, 64),
    **dict.fromkeys(_DEPTH, 4),  # hybrids have attention in every fourth layer or so
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_INNER, 128),
    **dict.fromkeys(_EXPERTS, 4),
    **{"num_key_value_heads": 2, "head_dim": 16, "d_kv": 16, "rotary_dim": 8},
    **{"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "kv_lora_rank": 32},
    **{"vocab_size": VOCABULARY, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64},
    **{"type_vocab_size": 2, "moe_intermediate_size": 32, "num_experts_per_tok": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_ALWAYS = ("head_dim", "num_key_value_heads", "pad_token_id", "bos_token_id", "eos_token_id")
"""Set even where a configuration leaves them open."""


@dataclass
class Arguments:
    """Command line."""

    results: Path = field(
        default=Path("results/architectures.json"),
        metadata={"help": "JSON; classes it holds are replaced, others kept."},
    )
    classes: list[str] = field(
        default_factory=lambda: ["*"], metadata={"help": "Glob patterns of class names."}
    )


@dataclass
class Outcome:
    """The outcome for one class; ``native`` says whether it has a native decode step."""

    name: str
    task: str
    result: Literal["works", "refused", "failed", "not tried"] = "not tried"
    reason: str = ""
    native: bool = False


def small_configs(config_class: Any) -> Iterator[Any]:
    """Configurations to try, the smallest first."""
    base = config_class()
    aliases = getattr(config_class, "attribute_map", {})
    known = {
        name: value
        for name, value in SMALL.items()
        if name not in aliases and (name in _ALWAYS or getattr(base, name, None) is not None)
    }
    for left in ((), ("head_dim",), ("head_dim", "num_key_value_heads", *_EXPERTS)):
        try:
            yield config_class(**{name: known[name] for name in known if name not in left})
        except Exception:  # classes check their settings; the next one's may do
            continue


def small_model(model_class: Any) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A tiny random model that runs, and inputs for it; ``ValueError`` where there is none."""
    ids = torch.randint(3, VOCABULARY - 10, (2, TOKENS))
    ids[:, -1] = SMALL["eos_token_id"]  # some classifiers read the state there
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    reason = "no small configuration"
    for config in small_configs(model_class.config_class):
        try:
            with torch.device("meta"):
                weights = sum(p.numel() for p in model_class(config).parameters())
            if weights > MOST_WEIGHTS:
                reason = f"{weights / 1e6:.0f} million weights at least"
                continue
            torch.manual_seed(0)
            model = model_class(config).eval()
            logits = logits_of(model, inputs)
            if bool(logits.isfinite().all()) and same_when_loaded(model, inputs, logits):
                return model, inputs
            reason = "its logits are not finite, or others once it was saved and loaded"
        except Exception as error:
            reason = describe(error)
    raise ValueError(reason)


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of a forward, in float32."""
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits.float()


def save_and_load(model: PreTrainedModel) -> Any:
    """The model that ``from_pretrained`` makes of the saved ``model``."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder)


def same_when_loaded(model: PreTrainedModel, inputs: dict[str, Tensor], logits: Tensor) -> bool:
    """Whether the saved and loaded ``model`` gives the same ``logits``."""
    return apart(logits_of(save_and_load(model), inputs), logits) < ROUNDING


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def apart(one: Tensor, other: Tensor) -> float:
    """The distance of two tensors, relative to the norm of ``other``."""
    return float((one - other).norm() / other.norm().clamp(min=1e-9))


# --------------------------------------------------------------------------------------- the steps


class RefusedError(Exception):
    """``quantize_model`` does not take the class."""


def convert(model: PreTrainedModel, **settings: Any) -> None:
    """Quantize ``model`` to 16 levels; ``RefusedError`` where it is not taken."""
    try:
        quantize_model(model, MaQDConfig(weight_levels=16, **settings))
    except ValueError as error:
        raise RefusedError(" ".join(str(error).split())) from error


def with_float_inputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Step 1 of the module docstring."""
    convert(model, activation_levels=None)
    model.train()
    model(**inputs).logits.float().square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(bool(g.isfinite().all()) for g in gradients), "gradients"
    model.zero_grad()
    model.eval()
    simulated = logits_of(model, inputs)
    pack_model(model)
    far = apart(logits_of(model, inputs), simulated)
    assert far < ROUNDING, f"packed and simulated are {far:.1e} apart"


def with_small_inputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> bool:
    """Step 2 of the module docstring; returns whether the model has a native decode step."""
    try:
        convert(model, activation_scaling="token", embedding_levels=255)
    except RefusedError:  # which left it as it was
        convert(model, activation_scaling="token")
    pack_model(model)
    packed = logits_of(model, inputs)
    assert bool(packed.isfinite().all()), "logits are not finite"
    loaded = save_and_load(model)
    far = apart(logits_of(loaded, inputs), packed)
    assert far < ROUNDING, f"loaded and saved are {far:.1e} apart"
    if loaded.can_generate():
        loaded.generate(**inputs, max_new_tokens=3, do_sample=False)
    return unsupported(loaded) is None


def attempt(name: str, task: str) -> Outcome:
    """All steps for the class ``name``."""
    outcome = Outcome(name, task)
    try:
        model, inputs = small_model(getattr(transformers, name))
    except Exception as error:
        outcome.reason = str(error) if isinstance(error, ValueError) else describe(error)
        return outcome
    try:
        with_float_inputs(copy.deepcopy(model), inputs)
        outcome.native = with_small_inputs(model, inputs)
        outcome.result = "works"
    except RefusedError as error:
        outcome.result, outcome.reason = "refused", str(error)
    except Exception as error:
        outcome.result, outcome.reason = "failed", describe(error)
    return outcome


# ----------------------------------------------------------------------------------------- the run


def wanted(patterns: list[str]) -> list[tuple[str, str]]:
    """The classes whose names match ``patterns``, each once, with their tasks."""
    found: dict[str, str] = {}
    for task, classes in TASKS.items():
        for names in classes.values():
            for name in [names] if isinstance(names, str) else names:
                if any(fnmatchcase(name, pattern) for pattern in patterns):
                    found.setdefault(name, task)
    return list(found.items())


def main(arguments: list[str] | None = None) -> None:
    """Try the classes; print and write what became of them."""
    parser = HfArgumentParser(Arguments)  # type: ignore[arg-type]
    (args,) = parser.parse_args_into_dataclasses(arguments)
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    file: Path = args.results
    rows = json.loads(file.read_text("utf-8"))["rows"] if file.exists() else []
    outcomes: dict[str, dict[str, Any]] = {row["name"]: row for row in rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    for name, task in tqdm(wanted(args.classes), unit="class"):
        outcome = attempt(name, task)
        outcomes[name] = asdict(outcome)
        if outcome.result in ("refused", "failed"):
            tqdm.write(f"{name} {outcome.result}: {outcome.reason}")
        report = {"versions": package_versions(), "rows": list(outcomes.values())}
        file.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    for result in ("works", "refused", "failed", "not tried"):
        print(f"{result}: {sum(row['result'] == result for row in outcomes.values())}")


if __name__ == "__main__":
    main()
