"""How one layer is quantized, in plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..functional import check_levels, get_surrogate
from .context import FirstToken

ActivationScaling = Literal["static", "token", "group"]
"""Which step an input is rounded with: "static", one learned step, so that nothing is reduced at
inference; "token", a step of each token, from its absmax; "group", a step of every group of a
token's inputs that share a weight scale, from that group's absmax (the token's where a row has one
scale).

The paper has the first. Steps of groups are Atom's (arXiv:2310.19102): a large input then coarsens
the grid of its neighbors only, which few levels need (notebook: "Clipping a token's grid"). For
one token they take 1.03 of the time that steps of tokens take (notebook: "What steps of groups cost
in the product")."""


@dataclass(frozen=True)
class LinearSpec:
    """How one layer is quantized; plain values, as they stand in a checkpoint's config.

    Args:
        weight_levels: M of the weights, 2..256, or None to keep them float.
        activation_levels: M of the input, 2..256, or None to keep it float.
        activation_scaling: "static", "token" or "group", see ``ActivationScaling``.
        activation_clip_ratio: share of its absmax that the grid of a token, or group, covers, in
            (0, 1]; what lies beyond is clipped, at 1 nothing (``functional.token_step``).
        first_token: "own": with static scaling, the first token of a sequence still gets a step
            of its own (pretrained models park a massive activation there); "shared": it has the
            layer's, like any other.
        group_size: inputs that share a weight scale, must divide the input width; None: the row.
        weight_offset: keep the row mean that standardization removes as a learned offset.
        surrogate: gradient of the activation staircase, a key of ``functional.SURROGATES``.
        rotation: neighboring inputs that a Hadamard transform mixes before they are quantized, a
            power of two; fewer where it does not divide the width (``rotation_size``); None: the
            input is not rotated.

    ``MaQDConfig`` takes the defaults from here, and has rules ("auto") for the two that depend on
    the levels; here those two are off.
    """

    weight_levels: int | None = 16
    activation_levels: int | None = 255
    activation_scaling: ActivationScaling = "static"
    activation_clip_ratio: float = 1.0
    first_token: FirstToken = "own"
    group_size: int | None = None
    weight_offset: bool = True
    surrogate: str = "clip"
    rotation: int | None = None

    def __post_init__(self) -> None:
        if self.weight_levels is not None:
            check_levels(self.weight_levels, "weight_levels")
        if self.activation_levels is not None:
            check_levels(self.activation_levels, "activation_levels")
        if self.activation_scaling not in get_args(ActivationScaling):
            raise ValueError(
                f"activation_scaling={self.activation_scaling!r}: choose 'static', 'token' or "
                "'group'"
            )
        if self.input_group is not None and (self.activation_levels or 1) % 2 == 0:
            raise ValueError(
                f"activation_levels={self.activation_levels}: steps of groups want an odd number, "
                "of which zero is one, such as 3, 15 or 255"
            )
        ratio = self.activation_clip_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
            raise ValueError(
                f"activation_clip_ratio={ratio!r}: a number in (0, 1], 1 clips nothing"
            )
        if self.first_token not in ("own", "shared"):
            raise ValueError(f"first_token={self.first_token!r}: choose 'own' or 'shared'")
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"group_size={size!r}: a positive int, or None for the row")
        get_surrogate(self.surrogate)
        mix = self.rotation
        if mix is not None and (
            isinstance(mix, bool) or not isinstance(mix, int) or mix < 2 or mix & (mix - 1)
        ):
            raise ValueError(f"rotation={mix!r}: a power of two from 2, or None")

    @property
    def static_activations(self) -> bool:
        """Whether inputs are quantized with one learned step."""
        return self.activation_levels is not None and self.activation_scaling == "static"

    @property
    def input_group(self) -> int | None:
        """The number of a token's inputs that share a step; None where all of them do."""
        return self.group_size if self.activation_scaling == "group" else None

    @property
    def weight_grid_levels(self) -> int:
        """``weight_levels`` of a layer that quantizes its weight; ``ValueError`` if it does not."""
        if self.weight_levels is None:
            raise ValueError("weight_levels=None: the layer's weight is float and has no grid")
        return self.weight_levels

    @property
    def input_grid_levels(self) -> int:
        """``activation_levels`` of a layer that quantizes its input; ``ValueError`` if not."""
        if self.activation_levels is None:
            raise ValueError("activation_levels=None: the layer's input is float and has no grid")
        return self.activation_levels

    def groups(self, in_features: int) -> int:
        """The number of groups in a row of ``in_features``.

        Raises:
            ValueError: ``group_size`` does not divide ``in_features``.
        """
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            raise ValueError(
                f"group_size={self.group_size} does not divide the input width {in_features}; "
                "choose a divisor, or None (one scale per row) for this layer with an override"
            )
        return in_features // self.group_size

    def on_table(self, levels: int) -> LinearSpec:
        """These settings for a head that shares an embedding's grid of ``levels``."""
        return replace(
            self, weight_levels=levels, group_size=None, weight_offset=True, rotation=None
        )

    def rotation_size(self, in_features: int) -> int:
        """How many neighboring inputs are mixed: the largest power of two up to ``rotation`` that
        divides the width; 1: none are.

        >>> LinearSpec(rotation=512).rotation_size(576)
        64
        """
        return math.gcd(self.rotation or 1, in_features)
