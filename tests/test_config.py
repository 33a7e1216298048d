"""Laws of ``MaQDConfig``."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest

from maqd_hf.config import MaQDConfig
from maqd_hf.nn import LinearSpec, NormSpec

OTHER: dict[str, Any] = {  # every field away from its default
    "weight_levels": 3,
    "activation_levels": 15,
    "activation_scaling": "token",
    "activation_clip_ratio": 0.9,
    "group_size": 64,
    "weight_offset": False,
    "embedding_levels": 255,
    "surrogate": "arctan",
    "rotation": 64,
    "first_token": "shared",
    "layer_batch_norm": False,
    "norm_affine": "fold",
    "lbn_final_norm": True,
    "lbn_qk_norm": True,
    "lbn_pooling": "mean",
    "lbn_momentum": 0.5,
    "targets": ["layers.*"],
    "exclude": ["*.down_proj"],
    "overrides": {"*.o_proj": {"weight_levels": None}},
    "state": "packed",
    "modules": {"layers.0.up_proj": {"kind": "linear", "bias": False, "weight_levels": 3}},
}
USER_FIELDS = [
    f.name for f in fields(MaQDConfig) if f.name not in ("digest", "format_version", "quant_method")
]


def test_the_example_covers_every_field() -> None:
    assert sorted(OTHER) == sorted(USER_FIELDS)
    default = MaQDConfig()
    assert not [name for name in OTHER if getattr(default, name) == OTHER[name]]


@pytest.mark.parametrize("use_diff", [True, False])
@pytest.mark.parametrize("settings", [{}, OTHER], ids=["default", "other"])
def test_a_config_survives_json(settings: dict[str, Any], use_diff: bool) -> None:
    config = MaQDConfig(**settings)
    text = config.to_json_string(use_diff=use_diff)
    again = MaQDConfig.from_dict(json.loads(text))
    assert again == config
    assert json.loads(text)["quant_method"] == "maqd"
    assert json.loads(text)["state"] == config.state
    assert again.to_json_string(use_diff=use_diff) == text


def test_a_config_survives_its_file(tmp_path: Any) -> None:
    config = MaQDConfig(**OTHER)
    config.to_json_file(tmp_path / "config.json")
    assert MaQDConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == config


@pytest.mark.parametrize("name", USER_FIELDS)
def test_configs_that_differ_in_one_field_are_unequal(name: str) -> None:
    assert MaQDConfig(**{name: OTHER[name]}) != MaQDConfig()
    assert MaQDConfig(**{name: OTHER[name]}) == MaQDConfig(**{name: OTHER[name]})
    assert name in MaQDConfig(**{name: OTHER[name]}).to_diff_dict()


def test_the_dict_is_a_copy() -> None:
    config = MaQDConfig(**OTHER)
    content = config.to_dict()
    content["overrides"][0][1]["weight_levels"] = 7
    content["targets"].append("x")
    assert config == MaQDConfig(**OTHER)
    source = {"overrides": {"a": {"weight_levels": 4}}}
    made = MaQDConfig.from_dict(source)
    source["overrides"]["a"]["weight_levels"] = 5
    assert made.overrides == {"a": {"weight_levels": 4}}


def test_unknown_fields_are_refused_not_dropped() -> None:
    with pytest.raises(ValueError, match=r"unknown fields \['bits'\].*known are.*weight_levels"):
        MaQDConfig.from_dict({"quant_method": "maqd", "bits": 4})


def test_unused_keyword_arguments_come_back() -> None:
    config, rest = MaQDConfig.from_dict({}, return_unused_kwargs=True, device_map="cpu")
    assert config == MaQDConfig() and rest == {"device_map": "cpu"}


# ----------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("levels", [0, 1, 257, 4.0, True, "4"])
@pytest.mark.parametrize("name", ["weight_levels", "activation_levels", "embedding_levels"])
def test_bad_levels_are_refused_by_name_and_value(name: str, levels: object) -> None:
    with pytest.raises(ValueError, match=f"{name}={levels!r} .*levels"):
        MaQDConfig(**{name: levels})
    if name != "embedding_levels":
        with pytest.raises(ValueError, match=f"{name}={levels!r}"):
            MaQDConfig(overrides={"*": {name: levels}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"state": "float"}, "state='float'.*'qat' or 'packed'"),
        ({"lbn_pooling": "max"}, "lbn_pooling='max'.*'mean' or 'geometric'"),
        ({"lbn_momentum": 0.0}, r"lbn_momentum=0\.0.*\(0, 1\]"),
        ({"lbn_momentum": 1.5}, r"lbn_momentum=1\.5"),
        ({"activation_scaling": "row"}, "activation_scaling='row'"),
        ({"first_token": "x"}, "first_token='x'"),
        ({"surrogate": "x"}, "surrogate='x'.*clip"),
        ({"group_size": -1}, "group_size=-1"),
        ({"activation_clip_ratio": 0}, r"activation_clip_ratio=0: .*\(0, 1\]"),
        ({"activation_clip_ratio": 1.5}, r"activation_clip_ratio=1\.5"),
        ({"activation_clip_ratio": "max"}, "activation_clip_ratio='max'"),
        ({"overrides": {"*": {"activation_clip_ratio": True}}}, "activation_clip_ratio=True"),
        ({"quant_method": "gptq"}, "quant_method='gptq'"),
        ({"format_version": 99}, "format_version=99.*install"),
        ({"overrides": {"*": {"bits": 4}}}, r"overrides\['\*'\].*\['bits'\].*weight_levels"),
        ({"targets": "*.up_proj"}, r"targets='\*\.up_proj'.*list"),
        ({"exclude": "lm_head"}, "exclude='lm_head'.*list"),
    ],
)
def test_bad_settings_name_value_and_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaQDConfig(**settings)


# ------------------------------------------------------------------------- settings by layer


@pytest.mark.parametrize("spec", [LinearSpec, NormSpec])
def test_a_setting_has_one_default_and_auto_is_a_rule_that_starts_from_it(spec: Any) -> None:
    asked = {f.name.removeprefix("lbn_"): f.default for f in fields(MaQDConfig)}
    differ = {f.name for f in fields(spec) if asked.get(f.name, f.default) != f.default}
    assert {asked[name] for name in differ} <= {"auto"}
    fine = MaQDConfig(weight_levels=17, activation_levels=17)
    assert fine.plain_linear_spec() == LinearSpec(weight_levels=17, activation_levels=17)
    assert MaQDConfig().norm_spec(centered=False, bias=False) == NormSpec()


def test_linear_spec_takes_every_setting_of_the_config() -> None:
    spec = MaQDConfig(**OTHER).linear_spec("layers.0.up_proj")
    for f in fields(LinearSpec):
        assert getattr(spec, f.name) == OTHER[f.name]


def test_tokens_of_few_levels_are_clipped_by_themselves() -> None:
    def ratio(**settings: Any) -> float:
        return MaQDConfig(**settings).linear_spec("x").activation_clip_ratio

    assert ratio(activation_levels=15, activation_scaling="token") == 0.8
    assert ratio(activation_levels=16, activation_scaling="token") == 0.8
    assert ratio(activation_levels=17, activation_scaling="token") == 1
    assert ratio(activation_levels=15) == ratio(activation_levels=None) == ratio() == 1
    both = {"activation_levels": 15, "activation_scaling": "token"}
    assert ratio(activation_clip_ratio=0.9, **both) == 0.9
    assert ratio(overrides={"*": both}) == 0.8
    assert ratio(overrides={"*": {"activation_clip_ratio": 1}}, **both) == 1


def test_config_files_from_before_a_setting_mean_what_they_meant() -> None:
    written = MaQDConfig(modules={}, activation_levels=15, activation_scaling="token").to_dict()
    del written["rotation"], written["activation_clip_ratio"]
    spec = MaQDConfig.from_dict(written).plain_linear_spec()
    assert spec.rotation is None and spec.activation_clip_ratio == 1


def test_a_settled_config_says_what_auto_decided() -> None:
    config = MaQDConfig(activation_levels=15, activation_scaling="token")
    settled = config.settled()
    assert (settled.rotation, settled.activation_clip_ratio) == (512, 0.8)
    assert settled.plain_linear_spec() == config.plain_linear_spec()
    assert settled.settled() == settled


def test_the_last_matching_override_wins_setting_by_setting() -> None:
    config = MaQDConfig(
        overrides={
            "*.down_proj": {"weight_levels": 255, "group_size": 32},
            "layers.0.*": {"weight_levels": 3},
            "layers.0.mlp.up_proj": {"activation_levels": None},
        }
    )
    assert config.linear_spec("layers.1.mlp.up_proj") == MaQDConfig().linear_spec("x")
    assert config.linear_spec("layers.1.mlp.down_proj").weight_levels == 255
    both = config.linear_spec("layers.0.mlp.down_proj")
    assert (both.weight_levels, both.group_size) == (3, 32)
    up = config.linear_spec("layers.0.mlp.up_proj")
    assert (up.weight_levels, up.activation_levels) == (3, None)


def test_overrides_keep_their_order_through_json() -> None:
    config = MaQDConfig(overrides={"z*": {"weight_levels": 3}, "*a": {"weight_levels": 5}})
    again = MaQDConfig.from_dict(json.loads(config.to_json_string()))
    assert again.linear_spec("za") == config.linear_spec("za")
    assert again.linear_spec("za").weight_levels == 5


def test_targets_speak_of_layers_and_exclude_of_everything() -> None:
    plain = MaQDConfig()
    assert plain.left_out("layers.0.up_proj", layer=True) is None
    assert "outside the base model" in (plain.left_out("/classifier", layer=True) or "")
    config = MaQDConfig(targets=["layers.*", "/lm_head"], exclude=["*.down_proj", "norm"])
    assert config.left_out("layers.0.up_proj", layer=True) is None
    assert config.left_out("/lm_head", layer=True) is None
    assert config.left_out("embed", layer=True) == "not in targets"
    assert config.left_out("embed") is None
    assert config.left_out("layers.0.down_proj", layer=True) == "excluded by '*.down_proj'"
    assert config.left_out("norm") == "excluded by 'norm'"


def test_defaults_give_way_to_overrides() -> None:
    config = MaQDConfig(weight_levels=4, overrides={"/head": {"weight_levels": 3}})
    assert config.linear_spec("/head", weight_levels=255, group_size=8).weight_levels == 3
    assert config.linear_spec("/head", weight_levels=255, group_size=8).group_size == 8
    assert config.linear_spec("other", weight_levels=255).weight_levels == 255


def test_norms_take_their_settings_from_the_config() -> None:
    norm = MaQDConfig(**OTHER).norm_spec(centered=True, bias=True)
    assert (norm.statistics, norm.first_token, norm.pooling) == ("token", "shared", "mean")
    assert (norm.momentum, norm.centered, norm.bias, norm.weight) == (0.5, True, True, True)
    assert MaQDConfig().norm_spec(centered=False, bias=False).statistics == "gated"
