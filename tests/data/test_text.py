"""Every token of every document ends up in a block, in order; errors say what to do."""

import pytest
from datasets import Dataset, DatasetDict
from tokenizers.processors import TemplateProcessing
from transformers import default_data_collator

from maqd_hf.data.text import load_labeled, load_split, load_text, spread_samples, tokenize_blocks


@pytest.fixture
def documents(sample_text):
    texts = sample_text[:20_000].split("\n\n")
    return Dataset.from_dict({"text": [*texts, ""], "number": range(len(texts) + 1)})


def joined(tokenizer, texts, bos):
    ids = []
    for text in filter(None, texts):
        row = tokenizer(text).input_ids
        ids += [tokenizer.bos_token_id, *row] if bos else [*row, tokenizer.eos_token_id]
    return ids


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("block_size", [1, 7, 128])
def test_blocks_are_the_joined_documents(byte_tokenizer, documents, block_size, bos):
    blocks = tokenize_blocks(documents, byte_tokenizer, block_size, bos=bos)
    expected = joined(byte_tokenizer, documents["text"], bos)
    expected = expected[: len(expected) // block_size * block_size]
    assert [token for row in blocks["input_ids"] for token in row] == expected
    assert blocks["labels"][-1] == blocks["input_ids"][-1]
    assert blocks.column_names == ["input_ids", "labels"]


def test_bos_follows_the_tokenizer(byte_tokenizer, documents):
    byte_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    blocks = tokenize_blocks(documents, byte_tokenizer, 64)
    assert blocks[0]["input_ids"][:2] != [0, 0]
    assert blocks[0]["input_ids"][0] == 0
    assert byte_tokenizer.eos_token_id not in blocks[0]["input_ids"]


@pytest.mark.parametrize("max_tokens", [64, 1000, 19_000, 10**9])
def test_max_tokens_is_a_prefix(byte_tokenizer, documents, max_tokens):
    whole = tokenize_blocks(documents, byte_tokenizer, 64)
    part = tokenize_blocks(documents, byte_tokenizer, 64, max_tokens=max_tokens)
    assert len(part) == min(len(whole), max_tokens // 64)
    assert part["input_ids"][:] == whole["input_ids"][: len(part)]


def test_max_tokens_reads_on_when_the_guess_was_low(byte_tokenizer):
    documents = Dataset.from_dict({"text": ["a"] * 500})  # 2 tokens for 1 character
    long = Dataset.from_dict({"text": ["</s>" * 5 + "b"] * 500})  # 7 tokens for 21 characters
    for dataset in (documents, long):
        blocks = tokenize_blocks(dataset, byte_tokenizer, 10, max_tokens=600)
        assert len(blocks) == 60
    few = Dataset.from_dict({"text": ["</s></s></s></s>"] * 1000})  # 5 tokens for 16 characters
    assert len(tokenize_blocks(few, byte_tokenizer, 10, max_tokens=4990)) == 499


def test_empty_and_missing_rows_are_no_documents(byte_tokenizer):
    documents = Dataset.from_dict({"text": [*[""] * 1500, None, "abc", "", "d"]})
    (block,) = tokenize_blocks(documents, byte_tokenizer, 6)["input_ids"]
    assert block == joined(byte_tokenizer, ["abc", "d"], False)


def test_rows_and_column_are_those_chosen(byte_tokenizer, documents):
    shuffled = documents.rename_column("text", "body").shuffle(seed=1)
    blocks = tokenize_blocks(shuffled, byte_tokenizer, 50, column="body")
    expected = joined(byte_tokenizer, shuffled["body"], False)
    assert blocks["input_ids"][3] == expected[150:200]


def test_default_collator_and_model_take_them(byte_tokenizer, tiny_llama, documents):
    blocks = tokenize_blocks(documents, byte_tokenizer, 32)
    batch = default_data_collator([blocks[0], blocks[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 32)
    assert tiny_llama(**batch).loss.isfinite()


def test_text_that_makes_no_block_is_refused(byte_tokenizer, documents):
    with pytest.raises(ValueError, match="No column 'story'; there are text, number"):
        tokenize_blocks(documents, byte_tokenizer, 8, column="story")
    with pytest.raises(ValueError, match="'number' holds int64 values, not strings"):
        tokenize_blocks(documents, byte_tokenizer, 8, column="number")
    with pytest.raises(ValueError, match="There is no text: 2 row"):
        tokenize_blocks(Dataset.from_dict({"text": ["", ""]}), byte_tokenizer, 8)
    with pytest.raises(ValueError, match="There is no text: 0 row"):
        tokenize_blocks(Dataset.from_dict({"text": []}), byte_tokenizer, 8)
    short = Dataset.from_dict({"text": ["abc", "defg"]})
    with pytest.raises(ValueError, match="has 9 tokens, less than one block of 10"):
        tokenize_blocks(short, byte_tokenizer, 10)
    with pytest.raises(ValueError, match="block_size=8 and max_tokens=7"):
        tokenize_blocks(documents, byte_tokenizer, 8, max_tokens=7)
    byte_tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        tokenize_blocks(documents, byte_tokenizer, 8)
    byte_tokenizer.bos_token = None
    with pytest.raises(ValueError, match="bos_token is not set"):
        tokenize_blocks(documents, byte_tokenizer, 8, bos=True)


def test_a_text_file_is_one_document(tmp_path):
    for name in ("a.txt", "b.raw"):
        (tmp_path / name).write_text("first line\n\nsecond line\n", encoding="utf-8")
        dataset = load_text(str(tmp_path / name), split="test")
        assert dataset["text"][:] == ["first line\n\nsecond line\n"]


def test_rows_of_a_table_are_documents(tmp_path, documents):
    documents.to_parquet(tmp_path / "x.parquet")
    documents.to_json(tmp_path / "x.jsonl")
    documents.to_csv(tmp_path / "x.csv", index=False)
    for name in ("x.parquet", "x.jsonl"):
        dataset = load_text(str(tmp_path / name))
        assert dataset.column_names == ["text"]
        assert dataset["text"][:] == documents["text"][:]
    assert len(load_text(str(tmp_path / "x.csv"))) == len(documents)
    assert len(load_text(str(tmp_path / "x.parquet"), split="train[:3]")) == 3
    assert load_split(str(tmp_path / "x.parquet")).column_names == ["text", "number"]


def test_joined_lines_are_one_document(tmp_path):
    Dataset.from_dict({"text": ["one\n", "", "two\n"]}).to_parquet(tmp_path / "x.parquet")
    assert load_text(str(tmp_path / "x.parquet"), join="")["text"][:] == ["one\ntwo\n"]


def test_a_folder_is_its_files_or_the_dataset_saved_there(tmp_path, documents):
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.txt").write_text("one\ntwo", encoding="utf-8")
    (files / "b.txt").write_text("three", encoding="utf-8")
    assert load_text(str(files))["text"][:] == ["one\ntwo", "three"]
    documents.save_to_disk(tmp_path / "saved")
    assert load_text(str(tmp_path / "saved"))["text"][:] == documents["text"][:]
    DatasetDict(train=documents).save_to_disk(tmp_path / "splits")
    assert len(load_text(str(tmp_path / "splits"))) == len(documents)
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        load_text(str(tmp_path / "splits"), split="test")


def test_the_only_column_of_strings_is_taken_and_more_must_be_named(tmp_path):
    data = {"title": ["t"], "body": ["b"], "n": [1]}
    Dataset.from_dict(data).to_parquet(tmp_path / "two.parquet")
    assert load_text(str(tmp_path / "two.parquet"), column="body")["text"][:] == ["b"]
    with pytest.raises(ValueError, match=r"which column holds the text.*'title', 'body'"):
        load_text(str(tmp_path / "two.parquet"))
    with pytest.raises(ValueError, match=r"no column 'n' of strings.*'title', 'body'"):
        load_text(str(tmp_path / "two.parquet"), column="n")


def test_a_missing_source_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_text(str(tmp_path / "missing.txt"))
    (tmp_path / "x.docx").write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"unknown file type; use one of .txt"):
        load_text(str(tmp_path / "x.docx"))
    with pytest.raises(FileNotFoundError, match="the Hub did not give it"):
        load_text("nobody-at-all/no-such-dataset")


def test_labeled_texts_are_text_and_class_numbers(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = {"label": ["no", "yes"], "gold": [0, 1], "sentence": ["a", "b"], "half": [0.0, 1.0]}
    Dataset.from_dict(rows).to_parquet(path)
    found = load_labeled(str(path), text_column="sentence", label_column="gold")
    assert found.to_dict() == {"text": ["a", "b"], "label": [0, 1]}
    with pytest.raises(ValueError, match=r"which column holds the text.*'label', 'sentence'"):
        load_labeled(str(path), label_column="gold")
    with pytest.raises(ValueError, match="no column 'stars'; there are label, gold"):
        load_labeled(str(path), text_column="sentence", label_column="stars")
    for column in ("label", "half"):
        with pytest.raises(ValueError, match="not classes"):
            load_labeled(str(path), text_column="sentence", label_column=column)
    Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}).to_parquet(path)
    with pytest.raises(ValueError, match="int64 values from -1, not classes"):
        load_labeled(str(path))


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (3, [0, 2, 4]), (9, [0, 1, 2, 3, 4])])
def test_samples_are_spread_over_the_text(count, expected):
    blocks = Dataset.from_dict({"input_ids": [[i, i] for i in range(5)]})
    assert spread_samples(blocks, count).tolist() == [[i, i] for i in expected]
