"""The operations that static norms and steps save at inference; and a block in integers alone.

    python -m scripts.experiments.static_inference                                    # SmolLM2-135M
    python -m scripts.experiments.static_inference --models data/models/stories260K \\
        --text data/tinystories

Each Llama-like model is converted three ways (16 weight levels, 255 activation levels) and counted
by ``maqd_hf.inference_cost``: float, packed with norms and steps per token, packed with both static
(every norm but the final one). Then the feed-forward half of every block of the static model is run
by ``IntegerMLP`` on the residual stream that the packed model has there, and its codes and outputs
are compared with the packed model's. Nothing is trained: neither depends on how good the model is.
``--skip_integer`` leaves the second part out.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel
from transformers.activations import ACT2FN

from maqd_hf import MaQDConfig, inference_cost, pack_model, quantize_model, use_native
from maqd_hf.calibration import calibrate_activations
from maqd_hf.calibration.static_norms import calibrate_norm_statistics
from maqd_hf.data.bundled import SMOLLM2, resolve_model
from maqd_hf.data.text import load_text, tokenize_blocks
from maqd_hf.evaluation.cost import Count, InferenceCost
from maqd_hf.evaluation.integer_block import IntegerMLP
from maqd_hf.functional import quantize
from maqd_hf.models.finding import gated_norms


@dataclass
class Arguments:
    """Command line."""

    models: list[str] = field(
        default_factory=lambda: [SMOLLM2], metadata={"help": "Folders, ids or embedded names."}
    )
    text: str = field(default="embedded", metadata={"help": "Text to calibrate and compare on."})
    results: Path = field(
        default=Path("results/static_inference.json"),
        metadata={"help": "JSON; models it holds are replaced, others kept."},
    )
    windows: int = field(default=8, metadata={"help": "Windows of 256 tokens."})
    skip_integer: bool = field(default=False, metadata={"help": "Only count."})


def packed(model: PreTrainedModel, ids: Tensor, static: bool) -> PreTrainedModel:
    """A packed copy with norms and steps all static (but the final norm), or all per token."""
    copied = copy.deepcopy(model)
    scaling: Any = "static" if static else "token"
    config = MaQDConfig(weight_levels=16, activation_scaling=scaling, rotation=None)
    quantize_model(copied, config)
    if static:
        calibrate_activations(copied, ids, progress=False)
        calibrate_norm_statistics(copied, ids)
        for norm in gated_norms(copied).values():
            norm.gate.fill_(1.0)
    pack_model(copied)
    use_native(copied, False)  # its modules are to be looked at
    return copied


def described(cost: InferenceCost) -> dict[str, Any]:
    """The sums of a count, for the results."""
    return {key: cost.to_dict()[key] for key in ("left", "saved", "first_token", "reduced")}


def observed(
    model: nn.Module, parts: dict[str, nn.Module], ids: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs and the outputs of ``parts``, by name, without those of first tokens."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = args[0][:, 1:], output[:, 1:]

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in parts.items()]
    model(ids)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def difference(own: Tensor, expected: Tensor) -> dict[str, int]:
    """How many of the codes ``own`` differ from those ``expected``, and by how much at most."""
    gap = (own.int() - expected).abs()
    return {"codes": gap.numel(), "differ": int((gap > 0).sum()), "most": int(gap.max())}


@torch.no_grad()
def compare_block(model: Any, index: int, ids: Tensor) -> dict[str, Any]:
    """Block ``index``'s feed-forward half in integers against the packed one's own forward.

    First tokens are left out: they have statistics and steps of their own.
    """
    block = model.model.layers[index]
    parts: dict[str, Any] = {
        "norm": block.post_attention_layernorm,
        "gate": block.mlp.gate_proj,
        "up": block.mlp.up_proj,
        "down": block.mlp.down_proj,
    }
    seen, outputs = observed(model, parts, ids)
    mlp = IntegerMLP(function=ACT2FN[model.config.hidden_act], **parts)

    def codes_of(name: str) -> Tensor:
        """Codes that the packed layer reads, centered on zero."""
        layer = parts[name]
        levels = layer.spec.activation_levels
        codes = quantize(seen[name], levels, layer.activation_step) - (levels - 1) // 2
        return codes.to(torch.int8)

    inputs = mlp.input_codes(mlp.to_fixed(seen["norm"]))
    expected = [codes_of("gate"), codes_of("up")]
    pairs = {
        "inputs": (torch.stack(inputs), torch.stack(expected)),
        "hidden, from equal inputs": (mlp.hidden_codes(expected), codes_of("down")),
        "hidden, from the residual": (mlp.hidden_codes(inputs), codes_of("down")),
    }
    found = {name: difference(*pair) for name, pair in pairs.items()}
    output = mlp.down(codes_of("down")) * 2.0**-mlp.fraction_bits
    error = (output - outputs["down"]).norm() / outputs["down"].norm()
    return {"block": index, **found, "output error, from equal hidden": float(error)}


def measure(name: str, arguments: Arguments) -> dict[str, Any]:
    """Counts of the three forms of a model, and its blocks in integers."""
    source = resolve_model(name)
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = load_text(arguments.text)
    blocks = tokenize_blocks(text, tokenizer, 256, max_tokens=256 * arguments.windows)
    ids = torch.tensor(blocks["input_ids"])
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    costs = {"float": inference_cost(model.eval())}
    costs["per token"] = inference_cost(packed(model, ids, static=False))
    static = packed(model, ids, static=True)
    costs["static"] = inference_cost(static)
    print(name)
    print(costs["static"].table(costs["float"]))
    print(f"norms and steps per token: {costs['per token'].left}")
    row: dict[str, Any] = {"model": name, "operations": list(asdict(Count()))}
    row["costs"] = {form: described(cost) for form, cost in costs.items()}
    if not arguments.skip_integer:
        count = len(static.model.layers)
        row["blocks"] = [compare_block(static, index, ids) for index in range(count)]
        for block in row["blocks"]:
            print(block, flush=True)
    return row


def main(arguments: Arguments) -> list[dict[str, Any]]:
    """Measure the models and write the results."""
    path = arguments.results
    rows: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    for name in arguments.models:
        row = measure(name, arguments)
        rows = [other for other in rows if other["model"] != name] + [row]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return rows


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()  # type: ignore[arg-type]
    main(parsed)
