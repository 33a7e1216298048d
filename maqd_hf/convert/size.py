"""The size of a model: bytes by kind and bits per weight, packed or as it would be packed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn

from ..functional import scale_dtype
from ..nn.kinds import PACKED, QUANTIZED, TABLES
from ..packing import words_per_row


@dataclass
class ModelSize:
    """The bytes of each kind of tensor, and the number of weights they stand for.

    ``words`` are packed codes; ``scales`` are weight scales and offsets, activation steps and
    statistics of norms; ``kept`` are tensors that are not quantized, in their own dtype.
    """

    words: int
    scales: int
    kept: int
    quantized_weights: int
    weights: int

    @property
    def file_bytes(self) -> int:
        """The bytes of all tensors; a safetensors file adds its header (about 100 B a tensor)."""
        return self.words + self.scales + self.kept

    @property
    def bits_per_weight(self) -> float:
        """All bits over all weights of the model, embeddings and what was kept included."""
        return 8 * self.file_bytes / max(self.weights, 1)

    @property
    def bits_per_quantized_weight(self) -> float:
        """The bits of words and scales over the quantized weights alone."""
        return 8 * (self.words + self.scales) / max(self.quantized_weights, 1)

    def table(self) -> str:
        """The breakdown as text, one line a kind."""
        mib = 2**20
        rows = [("packed words", self.words), ("scales", self.scales), ("kept", self.kept)]
        lines = [f"{name:<14}{size / mib:10.2f} MiB" for name, size in rows]
        share = 100 * self.quantized_weights / max(self.weights, 1)
        lines.append(f"{'total':<14}{self.file_bytes / mib:10.2f} MiB")
        lines.append(
            f"{self.bits_per_weight:.3f} bits a weight over all {self.weights:,}; "
            f"{share:.1f} % quantized at {self.bits_per_quantized_weight:.3f}"
        )
        return "\n".join(lines)


def _shape(module: nn.Module) -> tuple[int, int]:
    """The rows and columns of a quantized weight."""
    if isinstance(module, TABLES):
        return module.num_embeddings, module.embedding_dim
    return module.out_features, module.in_features  # type: ignore[return-value]


def _levels(module: nn.Module) -> int | None:
    """The levels of a weight; None where it is float."""
    if isinstance(module, TABLES):
        return module.levels
    return module.spec.weight_levels  # type: ignore[union-attr, return-value]


def model_size(model: nn.Module) -> ModelSize:
    """The size of a float, QAT or packed model; a QAT model is counted as it would be packed.

    Tied tensors count once.

    >>> model_size(nn.Linear(10, 10, bias=False)).bits_per_weight
    32.0
    """
    total: Counter[str] = Counter()
    seen: set[int] = set()

    def count(kind: str, tensor: Tensor | None, size: int | None = None) -> bool:
        if tensor is None or id(tensor) in seen:
            return False
        seen.add(id(tensor))
        total[kind] += tensor.numel() * tensor.element_size() if size is None else size
        return True

    for module in model.modules():
        levels = _levels(module) if isinstance(module, QUANTIZED) else None
        if levels is None:
            continue
        rows, columns = _shape(module)
        weight: Tensor = module.weight  # type: ignore[assignment]
        if count("words", weight, 4 * rows * words_per_row(columns, levels)):
            total["quantized"] += rows * columns
            total["weights"] += rows * columns
        seen.add(id(getattr(module, "weight_step", None)))  # training only
        packed = isinstance(module, PACKED)
        scale: Tensor = module.weight_scale if packed else module.weight_log_scale  # type: ignore[assignment]
        count("scales", scale, scale.numel() * scale_dtype(scale.shape[1]).itemsize)
        for name in ("weight_offset", "activation_step"):
            count("scales", getattr(module, name, None))
        count("scales", getattr(getattr(module, "activation", None), "log_step", None))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.endswith(("running_log_ms", "batches_seen", ".gate")):
            count("scales", tensor)
        elif count("kept", tensor):
            total["weights"] += tensor.numel()
    return ModelSize(
        total["words"], total["scales"], total["kept"], total["quantized"], total["weights"]
    )
