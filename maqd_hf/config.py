"""``MaQDConfig``: what a user asks for, and what a checkpoint says of itself. A leaf module."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from .functional import check_levels
from .nn import ActivationScaling, FirstToken, LinearSpec, NormSpec

QUANT_METHOD = "maqd"
FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, FORMAT_VERSION)

# Words of version 1 that have another spelling since; `norm_affine` still takes its old one.
_RESPELLED = {"absorb": "fold", "absorbed": "folded", "absorbed_by": "folded_into"}

# What "auto" means for fine grids (and in files from before there was such a setting), and for
# coarse ones.
_FINE: dict[str, Any] = {
    "rotation": LinearSpec.rotation,
    "activation_clip_ratio": LinearSpec.activation_clip_ratio,
}
_ROTATION = 512
_CLIP_RATIO = 0.8
_LINEAR_FIELDS = tuple(f.name for f in fields(LinearSpec))


def _patterns(value: Any, what: str) -> list[str]:
    if isinstance(value, str) or not all(isinstance(pattern, str) for pattern in value):
        raise ValueError(f"{what}={value!r}: give a list of glob patterns, e.g. ['*.down_proj']")
    return list(value)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of the annotated type ``kind``.

    Whole numbers pass for floats, NaN and infinity do not; a tuple is a list of that length.

    >>> _fits(4, int | None), _fits(True, int | None), _fits([4], list[str]), _fits(1, float)
    (True, False, False, True)
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin in (Union, UnionType):
        return any(_fits(value, choice) for choice in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is tuple:
        return (
            isinstance(value, list) and len(value) == len(inner) and all(map(_fits, value, inner))
        )
    if origin is dict:
        whole = isinstance(value, dict) and all(isinstance(key, str) for key in value)
        return whole and all(_fits(item, inner[1]) for item in value.values())
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def _in_words(kind: Any) -> str:
    """The annotated type ``kind`` as a sentence names it.

    >>> _in_words(Literal["own", "shared"]), _in_words(list[str] | None), _in_words(float)
    ("'own' or 'shared'", 'list[str] or null', 'finite float')
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (Union, UnionType):
        return " or ".join(map(_in_words, inner))
    if origin in (list, tuple):
        return f"list[{', '.join(map(_in_words, inner))}]"
    if origin is dict:
        return "object"
    return {type(None): "null", float: "finite float"}.get(kind) or str(kind.__name__)


_DAMAGED = "it was edited or damaged; download or save the checkpoint again"


def _check_types(where: str, kinds: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` that names a field which ``kinds`` lacks or wants of another type.

    ``where`` is the place of ``content`` in ``config.json``.
    """
    unknown = sorted(set(content) - set(kinds))
    if unknown:
        raise ValueError(
            f"config.json: {where} has unknown fields {unknown}: it was written by another maqd_hf "
            f"release or edited; known are {sorted(kinds)}"
        )
    for name, value in content.items():
        if not _fits(value, kinds[name]):
            raise ValueError(
                f"config.json: {where}.{name}={value!r:.200} must be of type "
                f"{_in_words(kinds[name])}: {_DAMAGED}"
            )


_EVERY_ENTRY = {"kind": str, "crc32": int | None}
_ENTRIES: dict[str, dict[str, Any]] = {
    "linear": get_type_hints(LinearSpec) | {"bias": bool, "tied_to": str} | _EVERY_ENTRY,
    "embedding": {"levels": int, "output_scale": float} | _EVERY_ENTRY,
    "norm": get_type_hints(NormSpec) | {"eps": float, "folded_into": list[str]} | _EVERY_ENTRY,
}
_REQUIRED = {"linear": {"bias"}, "embedding": {"levels"}, "norm": {"eps", "folded_into"}}
"""What an entry of ``modules`` may say and what it must, by its kind."""


def _check_entry(name: str, entry: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` that names what is wrong with an entry of ``modules`` in a file."""
    where, kind = f"quantization_config.modules[{name!r}]", entry.get("kind")
    if not isinstance(kind, str) or kind not in _REQUIRED:
        kinds = " or ".join(map(repr, _REQUIRED))
        raise ValueError(f"config.json: {where}.kind={kind!r:.200} must be {kinds}: {_DAMAGED}")
    _check_types(where, _ENTRIES[kind], entry)
    missing = sorted(_REQUIRED[kind] - set(entry))
    if missing:
        raise ValueError(f"config.json: {where} lacks {missing}: {_DAMAGED}")
    if kind == "norm" and entry["eps"] < 0:
        raise ValueError(f"config.json: {where}.eps={entry['eps']} must be at least 0: {_DAMAGED}")
    if kind == "norm" and not 0 < entry.get("momentum", 1) <= 1:
        raise ValueError(
            f"config.json: {where}.momentum={entry['momentum']} must be in (0, 1]: {_DAMAGED}"
        )


def _respell(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of ``modules`` of version 1 in today's words."""
    later = sorted(set(entry) & set(_RESPELLED.values()))
    if later:
        raise ValueError(
            f"config.json: format_version=1 does not know {later} of {name}: it was edited, and "
            f"is of format_version {FORMAT_VERSION}; download or save the checkpoint again"
        )
    return {_RESPELLED.get(key, key): value for key, value in entry.items()}


def _settle(settings: dict[str, Any]) -> LinearSpec:
    """A layer's settings with "auto" decided."""
    automatic = {name for name in _FINE if settings[name] == "auto"}
    spec = LinearSpec(**settings | {name: _FINE[name] for name in automatic})
    coarse_inputs = (spec.activation_levels or 256) <= 16
    if "rotation" in automatic and (coarse_inputs or (spec.weight_levels or 256) <= 16):
        spec = replace(spec, rotation=_ROTATION)
    by_token = not spec.static_activations and spec.input_group is None
    if "activation_clip_ratio" in automatic and coarse_inputs and by_token:
        spec = replace(spec, activation_clip_ratio=_CLIP_RATIO)
    return spec


@dataclass(eq=True, kw_only=True)
class MaQDConfig(QuantizationConfigMixin):
    """Settings of a MaQD model; JSON in ``config.json: quantization_config``.

    Args:
        weight_levels: levels of every converted weight, 2..256 (16 = 4 bit), None = float.
        activation_levels: levels of every converted layer's input, 2..256, None = float.
        activation_scaling: "static" (one learned step, calibrated first), "token" (one step a
            token, from its absmax) or "group" (one for every ``group_size`` inputs of a token).
        activation_clip_ratio: share of its absmax that the grid of a token, or group, covers, in
            (0, 1]; what lies beyond is clipped. "auto": 0.8 for at most 16 levels and one step a
            token, else 1 (``functional.token_step`` has the figures).
        group_size: inputs that share a weight scale of 16 bits; None = one scale per output row.
        weight_offset: learned offset per row (keeps the row mean standardization removes).
        embedding_levels: levels of the token embedding and of the output head, None = float.
        surrogate: gradient of the activation staircase, see ``functional.SURROGATES``.
        rotation: neighboring inputs that a Hadamard transform mixes before they are quantized, a
            power of two (``LinearSpec.rotation_size``); None: not rotated; "auto": 512 for layers
            with at most 16 levels of weights or inputs (``functional.hadamard`` has the figures).
        first_token: "own": the first token of a sequence keeps its own step and statistic
            (pretrained decoders need it); "shared": it is treated like any other.
        layer_batch_norm: replace norms by Layer-Batch Normalization with its gate closed.
        norm_affine: "keep": gamma and beta stay in the norms, and a static norm's constant joins
            gamma; "fold": they move into the layers that read the norm (``folding`` says what
            that costs), and a static norm in front of rows with one scale leaves nothing behind.
        lbn_final_norm, lbn_qk_norm: include the final norm and the q/k norms; by default they
            stay per token, the final one anchors the scale of the logits.
        lbn_pooling: "mean" of squares, or "geometric" (mean of their logs).
        lbn_momentum: weight of eight new samples in the running average (``NormSpec.momentum``).
        targets: glob patterns of layers to convert (names relative to the base model; outside it
            they start with "/"); None = every Linear of the base model. The embedding and the
            output head follow ``embedding_levels`` instead.
        exclude: glob patterns of modules to leave alone; wins over everything else.
        overrides: glob pattern -> settings of ``LinearSpec`` for the layers it matches; the last
            match wins, e.g. ``{"*.down_proj": {"weight_levels": 255}}``. A head tied to the
            embedding takes its grid from it and only the settings of activations from here.
        state, modules, format_version: written by the library, not by users.
        digest: what the files held when they were saved (``checkpoint.digest``); in files only.

    A pattern that matches nothing in the model raises when the model is converted. Defaults of
    layers and norms are those of ``LinearSpec`` and ``NormSpec``; what they are worth, one changed
    at a time: ``scripts/experiments/ablations.py``.

    >>> MaQDConfig(weight_levels=4, group_size=64).linear_spec("layers.0.mlp.up_proj").group_size
    64
    """

    weight_levels: int | None = LinearSpec.weight_levels
    activation_levels: int | None = LinearSpec.activation_levels
    activation_scaling: ActivationScaling = LinearSpec.activation_scaling
    activation_clip_ratio: float | Literal["auto"] = "auto"
    group_size: int | None = LinearSpec.group_size
    weight_offset: bool = LinearSpec.weight_offset
    embedding_levels: int | None = None
    surrogate: str = LinearSpec.surrogate
    rotation: int | Literal["auto"] | None = "auto"
    first_token: FirstToken = LinearSpec.first_token
    layer_batch_norm: bool = True
    norm_affine: Literal["keep", "fold"] = "keep"
    lbn_final_norm: bool = False
    lbn_qk_norm: bool = False
    lbn_pooling: Literal["mean", "geometric"] = NormSpec.pooling
    lbn_momentum: float = NormSpec.momentum
    targets: list[str] | None = None
    exclude: list[str] = field(default_factory=list)
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    state: Literal["qat", "packed"] = "qat"
    modules: dict[str, dict[str, Any]] | None = None
    digest: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    format_version: int = FORMAT_VERSION
    quant_method: str = QUANT_METHOD  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method={self.quant_method!r}: MaQDConfig is {QUANT_METHOD!r}")
        if self.format_version not in _READABLE_VERSIONS:
            raise ValueError(
                f"checkpoint format_version={self.format_version}, this maqd_hf reads "
                f"{_READABLE_VERSIONS}; install the maqd_hf release that wrote it"
            )
        if self.state not in ("qat", "packed"):
            raise ValueError(f"state={self.state!r}: 'qat' or 'packed'")
        self.norm_affine = _RESPELLED.get(self.norm_affine, self.norm_affine)  # type: ignore[assignment]
        if self.norm_affine not in ("keep", "fold"):
            raise ValueError(f"norm_affine={self.norm_affine!r}: 'keep' or 'fold'")
        if self.lbn_pooling not in ("mean", "geometric"):
            raise ValueError(f"lbn_pooling={self.lbn_pooling!r}: 'mean' or 'geometric'")
        if not 0 < self.lbn_momentum <= 1:
            raise ValueError(f"lbn_momentum={self.lbn_momentum} must be in (0, 1]")
        if self.embedding_levels is not None:
            check_levels(self.embedding_levels, "embedding_levels")
        entries = {} if self.modules is None else self.modules
        if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
            raise ValueError("modules: give a dict of module name -> settings, or None")
        self.targets = None if self.targets is None else _patterns(self.targets, "targets")
        self.exclude = _patterns(self.exclude, "exclude")
        for name, value in _FINE.items():
            if self.modules is not None and getattr(self, name) == "auto":  # written before it was
                setattr(self, name, value)
        self.overrides = dict(self.overrides)
        for pattern, settings in self.overrides.items():
            unknown = sorted(set(settings) - set(_LINEAR_FIELDS))
            if unknown:
                raise ValueError(
                    f"overrides[{pattern!r}] has unknown settings {unknown}; "
                    f"allowed are {sorted(_LINEAR_FIELDS)}"
                )
        plain = asdict(self.plain_linear_spec())
        for settings in self.overrides.values():
            _settle(plain | settings)

    def plain_linear_spec(self) -> LinearSpec:
        """The settings of a layer that no override matches."""
        return _settle({key: getattr(self, key) for key in _LINEAR_FIELDS})

    def settled(self) -> MaQDConfig:
        """A copy without "auto": what a checkpoint says, whatever later releases make of it."""
        plain = self.plain_linear_spec()
        return replace(self, **{name: getattr(plain, name) for name in _FINE})

    def linear_spec(self, name: str, **defaults: Any) -> LinearSpec:
        """The settings in force for the layer called ``name``.

        ``defaults`` replace plain settings; what an override says still wins over them.
        """
        settings = {key: getattr(self, key) for key in _LINEAR_FIELDS} | defaults
        for pattern, changes in self.overrides.items():
            if fnmatchcase(name, pattern):
                settings.update(changes)
        return _settle(settings)

    def norm_spec(self, centered: bool, bias: bool) -> NormSpec:
        """The settings of a converted norm whose affine is still its own."""
        return NormSpec(
            centered=centered,
            bias=bias,
            statistics="gated" if self.layer_batch_norm else "token",
            first_token=self.first_token,
            pooling=self.lbn_pooling,
            momentum=self.lbn_momentum,
        )

    def targeted(self, name: str) -> bool:
        """Whether ``targets`` name the layer explicitly."""
        return any(fnmatchcase(name, pattern) for pattern in self.targets or ())

    def left_out(self, name: str, layer: bool = False, outside: bool = False) -> str | None:
        """Why ``name`` is not converted, or None if it is.

        ``targets`` only speak of layers (``layer``); ``outside`` admits names outside the base.
        """
        for pattern in self.exclude:
            if fnmatchcase(name, pattern):
                return f"excluded by {pattern!r}"
        if layer and self.targets is not None:
            return None if self.targeted(name) else "not in targets"
        if name.startswith("/") and not outside:
            return "outside the base model (name it in targets)"
        return None

    # QuantizationConfigMixin prints, compares and writes configs its own way; ours is plain JSON.

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; ``overrides`` as a list of pairs.

        transformers writes JSON objects with sorted keys, and the order of overrides matters.
        """
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        content["overrides"] = [[pattern, changes] for pattern, changes in self.overrides.items()]
        if self.digest is None:
            del content["digest"]
        return copy.deepcopy(content)

    def to_diff_dict(self) -> dict[str, Any]:
        """The fields that differ from the defaults, and what identifies the format."""
        default = type(self)().to_dict()
        keep = {"quant_method", "state", "format_version"}
        return {k: v for k, v in self.to_dict().items() if k in keep or v != default.get(k)}

    def to_json_string(self, use_diff: bool = True) -> str:
        """JSON text, of the differences from the defaults unless ``use_diff`` is False."""
        content = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From JSON of any readable version; unknown fields raise, they would change the model."""
        content = copy.deepcopy(config_dict)
        if content.get("norm_affine") == "absorb":  # as version 1 spells it
            content["norm_affine"] = _RESPELLED["absorb"]
        hints = get_type_hints(cls)
        kinds = {f.name: hints[f.name] for f in fields(cls)}
        kinds["overrides"] |= list[tuple[str, dict[str, Any]]]  # in files
        kinds["modules"] = dict[str, Any] | None
        _check_types("quantization_config", kinds, content)
        of_layers = {name: kinds[name] for name in _LINEAR_FIELDS}
        for pattern, settings in dict(content.get("overrides", ())).items():
            _check_types(f"quantization_config.overrides[{pattern!r}]", of_layers, settings)
        entries = content.get("modules") or {}
        _check_types("quantization_config.modules", dict.fromkeys(entries, dict[str, Any]), entries)
        for name, entry in entries.items():
            entries[name] = _respell(name, entry) if content.get("format_version") == 1 else entry
            _check_entry(name, entries[name])
        try:
            config = cls(**content)
        except ValueError as error:
            raise ValueError(f"config.json: quantization_config: {error}") from None
        return (config, kwargs) if return_unused_kwargs else config


def quantization_config(model: nn.Module) -> MaQDConfig:
    """The ``MaQDConfig`` of a converted model; ``ValueError`` if it is not one."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(config, MaQDConfig):
        raise ValueError(
            f"{type(model).__name__} is not a MaQD model (its quantization_config is "
            f"{type(config).__name__}); convert it with quantize_model first"
        )
    return config
