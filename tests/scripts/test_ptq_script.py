"""scripts/quantize_ptq.py, on a model of a few kilobytes."""

import json
from importlib import import_module

from transformers import LlamaForCausalLM


def test_a_model_quantized_without_training_is_measured_and_saved(
    tiny_llama, byte_tokenizer, sample_text, tmp_path, capsys
):
    script = import_module("scripts.quantize_ptq")
    tiny_llama.save_pretrained(tmp_path / "float")
    byte_tokenizer.save_pretrained(tmp_path / "float")
    (tmp_path / "text.txt").write_text(sample_text[:6000], encoding="utf-8")
    words = [
        *("--model", tmp_path / "float", "--dataset", tmp_path / "text.txt", "--samples", 6),
        *("--sample_tokens", 64, "--weight_levels", 15, "--group_size", 32),
        *("--activation_levels", 255, "--window", 64, "--max_eval_windows", 5),
        *("--output_dir", tmp_path / "packed", "--metrics", tmp_path / "result.json"),
    ]
    metrics = script.main([str(word) for word in words])
    for file in (tmp_path / "packed" / "metrics.json", tmp_path / "result.json"):
        assert metrics == json.loads(file.read_text("utf-8"))
    assert metrics["gptq"]["layers"] == 14
    assert not {"output_dir", "metrics"} & set(metrics["arguments"])
    assert metrics["calibration_tokens"] == 6 * 64
    assert metrics["float"]["protocol"] == metrics["quantized"]["protocol"]
    ratio = metrics["quantized"]["perplexity"] / metrics["float"]["perplexity"]
    assert 0.9 < ratio < 1.1
    assert "quantized" in capsys.readouterr().out
    packed = LlamaForCausalLM.from_pretrained(tmp_path / "packed")
    assert packed.config.quantization_config.state == "packed"
    assert packed.config.quantization_config.weight_levels == 15
