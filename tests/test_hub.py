"""Push to a Hub and load by id, each in a process of its own, against a Hub on the loopback.

The first half pushes a plain Llama: it shows that the loopback Hub behaves as the libraries expect.
The second half is the law: what `pack_model` made comes back from the Hub bit for bit when the
process begins with `import maqd_hf`, and raises when it does not.
"""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.support.loopback_hub import USER, LoopbackHub, Repository

RunClient = Callable[..., subprocess.CompletedProcess[str]]

TINY_MODEL = """
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

def tiny_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)

def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=0,
    )).eval()

@torch.no_grad()
def logits(model):
    return model(torch.arange(32)[None]).logits
"""

LOAD_AND_COMPARE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

expected, *repo_ids = sys.argv[1:]
for repo_id in repo_ids:
    tokenizer = AutoTokenizer.from_pretrained(repo_id)
    assert tokenizer.decode(tokenizer("Ein Maß, 4 bits")["input_ids"]) == "Ein Maß, 4 bits"

    model = AutoModelForCausalLM.from_pretrained(repo_id)
    with torch.no_grad():
        assert torch.equal(model(torch.arange(32)[None]).logits, torch.load(expected))

    prompt = tokenizer("hello", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0]
    text = pipeline("text-generation", repo_id)("hello", max_new_tokens=4, do_sample=False)
    assert text[0]["generated_text"] == tokenizer.decode(tokens), text
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub
        assert not hub.unknown, "the loopback Hub lacks a route"


@pytest.fixture(scope="module")
def client(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> RunClient:
    """Run code in a fresh process that knows this Hub only, with an empty cache."""

    def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("client")
        return subprocess.run(
            [sys.executable, "-c", dedent(code), *map(str, arguments)],
            env=hub.client_env(home=folder / "cache") | {"OMP_NUM_THREADS": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def succeed(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout + result.stderr


# -- a plain model: the loopback Hub is a Hub -----------------------------------------------------


@pytest.fixture(scope="module")
def plain_logits(client: RunClient, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pushes `plain` (push_to_hub) and `trained` (Trainer.push_to_hub); the logits they have."""
    expected = tmp_path_factory.mktemp("plain") / "logits.pt"
    push = """
        import sys
        from transformers import Trainer, TrainingArguments

        model, tokenizer = tiny_llama(), tiny_tokenizer()
        torch.save(logits(model), sys.argv[1])
        model.push_to_hub("plain")
        tokenizer.push_to_hub("plain")
        arguments = TrainingArguments("run", hub_model_id="trained", report_to=[], use_cpu=True)
        Trainer(model, arguments, processing_class=tokenizer).push_to_hub()
    """
    succeed(client(TINY_MODEL + dedent(push), expected))
    return expected


def test_plain_models_return_from_the_hub(
    hub: LoopbackHub, client: RunClient, plain_logits: Path
) -> None:
    repo_ids = [f"{USER}/plain", f"{USER}/trained"]
    for repo_id in repo_ids:
        files = {"model.safetensors", "config.json", "tokenizer.json", "README.md"}
        assert files <= set(hub.resolve(repo_id)[1])
    succeed(client(LOAD_AND_COMPARE, plain_logits, *repo_ids))


def test_every_revision_stays_readable_and_unchanged_files_are_skipped(
    hub: LoopbackHub, client: RunClient
) -> None:
    code = """
        from pathlib import Path
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download

        api = HfApi()
        repo_id = api.create_repo("notes").repo_id

        def push(text):
            return api.upload_file(repo_id=repo_id, path_in_repo="a/b.txt", path_or_fileobj=text)

        first, second = push(b"one"), push(b"two")
        assert first.oid != second.oid == push(b"two").oid
        for revision, text in ((first.oid, "one"), (second.oid, "two"), ("main", "two")):
            assert Path(hf_hub_download(repo_id, "a/b.txt", revision=revision)).read_text() == text
        assert [f.path for f in api.list_repo_tree(repo_id, "a")] == ["a/b.txt"]
        assert Path(snapshot_download(repo_id), "a/b.txt").read_text() == "two"
    """
    succeed(client(code))


def test_a_range_is_served_and_what_is_missing_is_named(hub: LoopbackHub) -> None:
    hub.repositories["some/repo"] = Repository({"file": b"0123456789"})

    def get(path: str, **headers: str) -> tuple[int, bytes, str | None]:
        request = urllib.request.Request(f"{hub.url}/{path}", headers=headers)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read(), answer.headers.get("Content-Range")
        except urllib.error.HTTPError as error:
            return error.code, b"", error.headers.get("X-Error-Code")

    url = "some/repo/resolve/main/file"
    assert get(url) == (200, b"0123456789", None)
    assert get(url, Range="bytes=3-5") == (206, b"345", "bytes 3-5/10")
    assert get(url, Range="bytes=7-") == (206, b"789", "bytes 7-9/10")
    assert get(url, Range="bytes=10-") == (416, b"", "RangeNotSatisfiable")
    assert get("some/repo/resolve/main/none") == (404, b"", "EntryNotFound")
    assert get("some/repo/resolve/none/file") == (404, b"", "RevisionNotFound")
    assert get("some/none/resolve/main/file") == (404, b"", "RepoNotFound")


# -- a packed model -------------------------------------------------------------------------------

PACKED = f"{USER}/packed"


@pytest.fixture(scope="module")
def packed_logits(client: RunClient, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pushes a packed model with its tokenizer and card; the logits it has."""
    expected = tmp_path_factory.mktemp("packed") / "logits.pt"
    push = """
        import sys
        import maqd_hf
        from huggingface_hub import upload_file
        from maqd_hf import MaQDConfig, pack_model, quantize_model
        from maqd_hf.evaluation.model_card import model_card

        model, tokenizer = tiny_llama(), tiny_tokenizer()
        config = MaQDConfig(weight_levels=16, activation_levels=255, activation_scaling="token")
        report = quantize_model(model, config)
        pack_model(model)
        torch.save(logits(model), sys.argv[1])
        repo_id = model.push_to_hub("packed", commit_message="packed").repo_url.repo_id
        tokenizer.push_to_hub(repo_id)
        model.save_pretrained("saved", push_to_hub=True, repo_id="saved-and-pushed")
        tokenizer.push_to_hub("saved-and-pushed")
        card = model_card(
            repo_id,
            base_model="tester/plain",
            metrics={"bits_per_weight": 4.0},
            report=str(report),
            config=model.config.to_dict()["quantization_config"],
            license="apache-2.0",
        )
        # ModelCard.push_to_hub would ask the real Hub first, before huggingface_hub 2
        upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=repo_id)
    """
    succeed(client(TINY_MODEL + dedent(push), expected))
    return expected


def test_packed_model_returns_bit_for_bit(client: RunClient, packed_logits: Path) -> None:
    repo_ids = [PACKED, f"{USER}/saved-and-pushed"]
    succeed(client("import maqd_hf\n" + LOAD_AND_COMPARE, packed_logits, *repo_ids))


def test_the_card_on_the_hub_is_ours(hub: LoopbackHub, packed_logits: Path) -> None:
    card = ModelCard(hub.resolve(PACKED)[1]["README.md"].decode())
    front_matter: Any = card.data
    assert front_matter.base_model == f"{USER}/plain"
    assert "maqd" in front_matter.tags


def test_the_usage_block_of_the_card_runs_as_printed(
    hub: LoopbackHub, client: RunClient, packed_logits: Path
) -> None:
    readme = hub.resolve(PACKED)[1]["README.md"].decode()
    usage = readme.split("```python\n")[1].split("```")[0]
    assert PACKED in usage
    result = client(usage)
    succeed(result)
    assert "Once upon a time" in result.stdout


def test_without_the_package_loading_raises(client: RunClient, packed_logits: Path) -> None:
    result = client(LOAD_AND_COMPARE, packed_logits, PACKED)
    assert result.returncode != 0
    assert "from_pretrained" in result.stderr
    assert "mismatch" in result.stderr.splitlines()[-1], result.stderr
