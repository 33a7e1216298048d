"""Text from a file, a folder, the Hub or an installed package, as blocks of tokens for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, Features, Sequence, Value, load_dataset, load_from_disk
from transformers import PreTrainedTokenizerBase

from .bundled import embedded_text


def bos_token(tokenizer: Any, add_bos: bool | None = None) -> int | None:
    """The id of the BOS token that text starts with, or None if it starts with none.

    ``add_bos=None`` does what the tokenizer does.

    Raises:
        ValueError: ``add_bos=True`` and the tokenizer has none.
    """
    own: int | None = tokenizer.bos_token_id
    if add_bos and own is None:
        raise ValueError("A BOS token is asked for, but tokenizer.bos_token is not set.")
    if add_bos is None:
        add_bos = own is not None and tokenizer("a").input_ids[0] == own
    return own if add_bos else None


EMBEDDED = "embedded"
"""The name that stands for the text inside a package where a command asks for a dataset."""
_BUILDERS = {
    ".txt": "text",
    ".md": "text",
    ".raw": "text",  # WikiText's own files
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
}
_STRINGS = ("string", "large_string")
_CHARACTERS_PER_TOKEN = 6  # a first guess: more than any usual tokenizer has on prose


def load_split(source: str, *, split: str = "train", config_name: str | None = None) -> Dataset:
    """One split of a dataset, with all its columns.

    Args:
        source: ``"embedded"`` (``bundled.embedded_text``; splits train and eval), a file (.txt, .md
            or .raw is one document; .parquet, .json, .jsonl, .csv), a folder of such files or one
            that ``save_to_disk`` wrote, or a dataset id on the Hub.
        split: name of the split, with a slice if wanted (``"train[:10%]"``; not for
            ``"embedded"``). A single file is the split that is asked for, whatever its name.
        config_name: configuration of a Hub dataset.

    Raises:
        FileNotFoundError: no such file or folder, and the Hub does not give it either.
        ValueError: unknown file type, or no such split.
    """
    if source == EMBEDDED:
        return embedded_text("train" if split == "train" else _eval_split(split))
    path = Path(source).expanduser()
    if path.is_file():
        builder = _BUILDERS.get(path.suffix)
        if builder is None:
            raise ValueError(f"{source}: unknown file type; use one of {', '.join(_BUILDERS)}.")
        options = {"sample_by": "document"} if builder == "text" else {}
        files = {split.partition("[")[0]: str(path)}
        return load_dataset(builder, data_files=files, split=split, **options)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"{source} has no split {split!r}; it has {', '.join(saved)}.")
            return saved[split]
        return saved
    if not path.exists() and (path.suffix in _BUILDERS or source.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"There is no file or folder {source}.")
    options = {"sample_by": "document"} if any(path.glob("*.txt")) else {}
    try:
        return load_dataset(source, config_name, split=split, **options)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source!r} is neither {EMBEDDED!r} nor a file or folder here, and the Hub did not "
            f"give it: {error}"
        ) from error


def _eval_split(split: str) -> Any:
    """The embedded text's name of a held-out split that is asked for by a common name."""
    return "eval" if split in ("validation", "test") else split


def load_text(
    source: str,
    *,
    split: str = "train",
    column: str | None = None,
    config_name: str | None = None,
    join: str | None = None,
) -> Dataset:
    """One split of a text dataset, with the single column ``"text"``.

    Args:
        source, split, config_name: as in `load_split`.
        column: the column that holds the text; None: ``"text"``, or the only column of strings.
        join: put between the rows to make them one document: for datasets whose rows are the
            lines of a text, like WikiText. None keeps every row a document.

    Raises:
        ValueError: no such column, or several to choose from; the message names them.
    """
    dataset = load_split(source, split=split, config_name=config_name)
    column = _text_column(dataset, source, column)
    if join is not None:
        return Dataset.from_dict({"text": [join.join(dataset[column])]})
    return dataset.select_columns([column]).rename_columns({column: "text"})


def load_labeled(
    source: str,
    *,
    split: str = "train",
    text_column: str | None = None,
    label_column: str = "label",
    config_name: str | None = None,
) -> Dataset:
    """One split of a classification set, with the columns ``"text"`` and ``"label"``.

    Args:
        source, split, config_name: as in `load_split`.
        text_column: as ``column`` in `load_text`.
        label_column: the column that holds the classes, numbers from 0.

    Raises:
        ValueError: no such column, or labels that are not class numbers.
    """
    dataset = load_split(source, split=split, config_name=config_name)
    text_column = _text_column(dataset, source, text_column)
    if label_column not in dataset.column_names:
        raise ValueError(
            f"{source}: no column {label_column!r}; there are {', '.join(dataset.column_names)}."
        )
    kind = dataset.features[label_column].dtype
    labels = pc.min(dataset.with_format("arrow")[:][label_column]).as_py() if len(dataset) else 0
    if not kind.startswith(("int", "uint")) or labels is None or labels < 0:
        raise ValueError(
            f"{source}: column {label_column!r} holds {kind} values from {labels!r}, not classes "
            "numbered from 0: leave out unlabeled rows, map other labels to numbers."
        )
    columns = {text_column: "text", label_column: "label"}
    return dataset.select_columns(list(columns)).rename_columns(columns)


def _text_column(dataset: Dataset, source: str, column: str | None) -> str:
    """The column of strings that was asked for, or the obvious one."""
    strings = [
        name
        for name, feature in dataset.features.items()
        if getattr(feature, "dtype", None) in _STRINGS
    ]
    if column is None:
        if "text" not in strings and len(strings) != 1:
            raise ValueError(
                f"{source}: say which column holds the text; columns of strings: {strings}."
            )
        return "text" if "text" in strings else strings[0]
    if column not in strings:
        raise ValueError(f"{source}: no column {column!r} of strings; there are {strings}.")
    return column


def tokenize_blocks(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    column: str = "text",
    max_tokens: int | None = None,
    bos: bool | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """Join documents in one row of tokens and cut it into blocks of equal length.

    Each document gets one boundary token: BOS in front of it, or else EOS after it. A rest shorter
    than a block is dropped; nothing else is. The columns are ``input_ids`` and ``labels``, equal
    (the model shifts them), each ``block_size`` integers: ``transformers.default_data_collator``
    makes batches of shape (batch, block_size) of them.

    Args:
        dataset: one document a row.
        tokenizer: a transformers tokenizer.
        block_size: tokens of a block.
        column: the column that holds the text.
        max_tokens: no more than so many tokens (rounded down to whole blocks). Only about as
            many documents as that takes are tokenized.
        bos: True for BOS, False for EOS, None for BOS if the tokenizer adds it itself.
        num_proc: processes of ``Dataset.map``.

    Raises:
        ValueError: no such column, no text, less text than one block, or a tokenizer without
            the boundary token.
    """
    if block_size < 1 or (max_tokens is not None and max_tokens < block_size):
        raise ValueError(
            f"block_size must be positive and at most max_tokens, got block_size={block_size} "
            f"and max_tokens={max_tokens}."
        )
    if column not in dataset.column_names:
        raise ValueError(f"No column {column!r}; there are {', '.join(dataset.column_names)}.")
    kind = getattr(dataset.features[column], "dtype", None)
    if len(dataset) and kind not in _STRINGS:
        raise ValueError(f"Column {column!r} holds {kind or 'no'} values, not strings.")
    ids = _token_row(dataset.select_columns([column]), tokenizer, max_tokens, bos, num_proc)
    blocks = min(len(ids), max_tokens or len(ids)) // block_size
    if blocks == 0:
        raise ValueError(
            f"The text has {len(ids)} tokens, less than one block of {block_size}: give more "
            f"text, or a block_size of at most {len(ids)}."
        )
    return cut_blocks(ids[: blocks * block_size], block_size)


def cut_blocks(ids: pa.Array, block_size: int) -> Dataset:
    """The dataset that `tokenize_blocks` describes, of a row of tokens that fills whole blocks."""
    rows = pa.FixedSizeListArray.from_arrays(ids, block_size)
    return Dataset(pa.table({"input_ids": rows, "labels": rows}))


def spread_samples(blocks: Dataset, count: int) -> torch.Tensor:
    """The ids (samples, block_size) of ``count`` blocks that are spread evenly over ``blocks``.

    ``blocks`` come from `tokenize_blocks`; where there are fewer, all are taken.
    """
    chosen = torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).long().tolist()
    return torch.tensor(blocks[chosen]["input_ids"])


def _token_row(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None,
    bos: bool | None,
    num_proc: int | None,
) -> pa.Array:
    """All documents as one row of tokens, or enough of them to have ``max_tokens``."""
    (column,) = documents.column_names
    before, after = _boundary(tokenizer, bos)

    def tokenize(texts: list[str | None]) -> dict[str, list[list[int]]]:
        texts = [text or "" for text in texts]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
        return {"input_ids": [before + row + after if row else [] for row in ids]}

    text = documents.with_format("arrow")[:][column].cast(pa.large_string())
    lengths = np.cumsum(pc.utf8_length(text).fill_null(0))
    if len(lengths) == 0 or lengths[-1] == 0:
        raise ValueError(f"There is no text: {len(lengths)} row(s), column {column!r} is empty.")
    wanted = lengths[-1] if max_tokens is None else max_tokens * _CHARACTERS_PER_TOKEN
    while True:
        enough = min(int(np.searchsorted(lengths, wanted)) + 1, len(lengths))
        tokens = documents.select(range(enough)).map(
            tokenize,
            batched=True,
            input_columns=column,
            remove_columns=column,
            features=Features({"input_ids": Sequence(Value("int32"))}),
            num_proc=num_proc,
            desc="tokenizing",
        )
        ids = tokens.with_format("arrow")[:]["input_ids"].combine_chunks().flatten()
        if enough == len(lengths) or len(ids) >= (max_tokens or 0):
            return ids
        wanted *= 2


def _boundary(tokenizer: PreTrainedTokenizerBase, bos: bool | None) -> tuple[list[int], list[int]]:
    """The tokens in front of and after each document: one of the two is empty."""
    first = bos_token(tokenizer, bos)
    if first is not None:
        return [first], []
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no eos_token to mark where a document ends: set "
            "tokenizer.eos_token, or pass bos=True if it has a bos_token."
        )
    return [], [tokenizer.eos_token_id]
