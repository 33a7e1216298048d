"""A trainable quantized embedding, row by row on the same grid as the linear layers.

Not in the paper: in small models the (tied) embedding is a fifth of the parameters, so that beside
2-bit weights a float one would be two thirds of the file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..functional import check_levels
from ..kernels.fake_quantize import fake_quantize_weight, weight_codes
from .linear import MaQDLinear, Start
from .precision import Apply, mark_output_dtype, without_narrowing
from .spec import LinearSpec


class MaQDEmbedding(nn.Embedding):
    """An embedding whose rows are standardized, round-clipped and rescaled like a weight's rows.

    It takes ids (...) and gives (..., dim) in the dtype of the empty parameter ``output_like``. Its
    parameters are those of a ``MaQDLinear`` with one group a row; a tied head is a ``MaQDLinear``
    that holds the very same ones. ``output_scale`` multiplies the output (Gemma scales its
    embedding, but not the head tied to it).

    >>> table = MaQDEmbedding.from_embedding(nn.Embedding(10, 8), levels=15)
    >>> table(torch.tensor([3])).unique().numel() <= 15
    True
    """

    output_like: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        levels: int,
        padding_idx: int | None = None,
        output_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        output_dtype: torch.dtype | None = None,
    ) -> None:
        self.levels, self.output_scale = check_levels(levels), output_scale
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        rows = torch.empty(num_embeddings, 1, device=device, dtype=dtype)
        self.weight_step = nn.Parameter(rows, requires_grad=False)
        self.weight_log_scale = nn.Parameter(torch.empty_like(rows))
        self.weight_offset = nn.Parameter(torch.empty_like(rows))
        mark_output_dtype(self, output_dtype or dtype)
        if not self.weight.is_meta:
            self.reset_quantizer("gaussian")

    def _apply(self, fn: Apply, recurse: bool = True) -> MaQDEmbedding:
        wide = [p for p in self.parameters(recurse=False) if p is not self.output_like]
        return super()._apply(without_narrowing(fn, wide), recurse)

    def as_linear(self, spec: LinearSpec) -> MaQDLinear:
        """A head tied to this table: a ``MaQDLinear`` that holds the same parameters.

        Its grid is the table's; ``spec`` gives the settings of its activations.
        """
        spec = spec.on_table(self.levels)
        head = MaQDLinear(self.embedding_dim, self.num_embeddings, False, spec, device="meta")
        for name in ("weight", "weight_step", "weight_log_scale", "weight_offset"):
            setattr(head, name, getattr(self, name))
        return head

    def reset_quantizer(self, start: Start = "search") -> None:
        """Take start values from the current rows, as ``MaQDLinear.reset_quantizer`` does."""
        self.as_linear(LinearSpec(self.levels, None)).reset_quantizer(start)

    def weight_codes(self) -> Tensor:
        """The table's codes (rows, dim), floats in 0..M-1."""
        return weight_codes(self.weight, self.weight_step, self.levels)

    def quantized_weight(self) -> Tensor:
        """The table in force (rows, dim), without ``output_scale``; differentiable."""
        return fake_quantize_weight(
            self.weight,
            self.weight_step,
            self.weight_log_scale.exp(),
            self.weight_offset,
            self.levels,
        )

    def forward(self, input: Tensor) -> Tensor:
        ids = input.flatten()

        def look_up(table: Tensor) -> Tensor:
            return nn.functional.embedding(ids, table, self.padding_idx)

        rows = fake_quantize_weight(
            look_up(self.weight),
            look_up(self.weight_step),
            look_up(self.weight_log_scale).exp(),
            look_up(self.weight_offset),
            self.levels,
        )
        rows = rows.view(*input.shape, self.embedding_dim) * self.output_scale
        return rows.to(self.output_like.dtype)

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        levels: int,
        output_scale: float = 1.0,
        start: Start | None = "search",
    ) -> MaQDEmbedding:
        """A quantized copy of ``embedding`` on its device."""
        dtype = torch.promote_types(embedding.weight.dtype, torch.float32)
        table = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            levels,
            embedding.padding_idx,
            output_scale,
            device="meta",
            dtype=dtype,
            output_dtype=embedding.weight.dtype,
        ).to_empty(device=embedding.weight.device)
        with torch.no_grad():
            table.weight.copy_(embedding.weight)
        if start is not None and not embedding.weight.is_meta:
            table.reset_quantizer(start)
        return table

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, levels={self.levels}"
