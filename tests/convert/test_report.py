"""Laws of ``ConversionReport``: every layer is in it once, and it can be read and stored."""

from __future__ import annotations

import json

import pytest

from maqd_hf import ConversionReport, pack_model, quantize_model
from maqd_hf.models.finding import modules_of
from maqd_hf.models.names import collapse
from maqd_hf.nn import LayerBatchNorm
from maqd_hf.nn.kinds import QUANTIZED
from tests.support.families import FAMILIES, tiny


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], []),
        (["a.b"], ["a.b"]),
        (["h.0.x", "h.1.x", "h.3.x"], ["h.{0-1,3}.x"]),
        (["h.10.x", "h.9.x", "h.2.x"], ["h.{2,9-10}.x"]),
        (["h.0.x", "h.0.y", "h.1.x"], ["h.{0-1}.x", "h.{0}.y"]),
        (["e.0.f.0.w", "e.1.f.0.w", "e.0.f.1.w"], ["e.{0-1}.f.0.w", "e.{0}.f.1.w"]),
    ],
)
def test_names_that_differ_in_layer_numbers_become_one(
    names: list[str], expected: list[str]
) -> None:
    assert collapse(names) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_named_once(family: str) -> None:
    model = tiny(family)
    for report in (quantize_model(model, activation_scaling="token"), pack_model(model)):
        tables = (report.linears, report.embeddings, report.norms, report.kept)
        named = [name for table in tables for name in table]
        assert len(named) == len(set(named))
        ours = {name for name, _ in modules_of(model, *QUANTIZED, LayerBatchNorm)}
        assert ours == {*report.linears, *report.embeddings, *report.norms}
        for name, module in model.named_modules():
            if any(p.dim() > 1 for p in module.parameters(recurse=False)):
                assert name in named


def test_text_and_json_name_every_module() -> None:
    model = tiny("gemma3")
    settings = {"activation_scaling": "token", "exclude": ["layers.1.mlp.*"]}
    settings |= {"norm_affine": "fold"}
    report = quantize_model(model, weight_levels=3, group_size=16, embedding_levels=15, **settings)
    text = str(report)
    for part in (
        "MaQD qat model",
        "3 levels, groups of 16, 255-level token activations",
        "model.layers.{0}.mlp.up_proj",
        "final norm (lbn_final_norm switches it on)",
        "q/k norm (lbn_qk_norm switches it on)",
        "gate closed",
        "its output also feeds",
        "excluded by 'layers.1.mlp.*'",
        "bits a weight",
    ):
        assert part in text, part
    content = json.loads(json.dumps(report.to_dict()))
    assert content["linears"] == report.linears
    assert content["bits_per_weight"] == report.bits_per_weight > 3
    packed = pack_model(model)
    assert "MaQD packed model" in str(packed)
    assert packed.kept["model.layers.1.mlp.up_proj"] == "float (Linear)"


def test_an_empty_report_has_no_bits_per_weight() -> None:
    report = ConversionReport("qat")
    assert str(report) == "MaQD qat model" and report.bits_per_weight != report.bits_per_weight
