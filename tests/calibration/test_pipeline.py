"""All start values in order."""

import copy
import json

import torch

from maqd_hf import quantize_model
from maqd_hf.calibration import (
    calibrate,
    calibrate_activations,
    gptq,
    smooth,
)


def test_calibrate_does_all_three_in_order(tiny_llama, ids):
    quantize_model(tiny_llama, weight_levels=8, activation_levels=255, layer_batch_norm=False)
    twin = copy.deepcopy(tiny_llama)
    report = calibrate(tiny_llama, ids, progress=False)
    smooth(twin, ids, start="range", progress=False)
    gptq(twin, ids, progress=False)
    calibrate_activations(twin, ids, progress=False)
    for a, b in zip(tiny_llama.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    summary = report.summary()
    assert summary == json.loads(json.dumps(summary))
    found, smoothed = summary["gptq"], summary["smoothing"]
    assert (found["layers"], found["unreachable_rows"]) == (14, 0)
    assert found["error"] < found["rounding_error"]
    assert smoothed["edges"] == len(report.smoothing.weights) > 0
    before, after = (smoothed["inputs"][i] + smoothed["weights"][i] for i in (0, 1))
    assert 0 < after < before
    assert str(report).startswith("smoothing: ") and "\nGPTQ: 14 layers" in str(report)
    plain = calibrate(twin, ids, gptq_weights=False, smoothing=False, progress=False)
    assert plain.summary() == {"smoothing": None, "gptq": None} and str(plain) == ""
