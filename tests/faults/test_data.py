# SPDX-License-Identifier: Apache-2.0
"""Reliability cases 13 and 14: foreign data states, and records that cannot be read."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from sqzjax.errors import DataError
from sqzjax.io.tokenizer import ByteTokenizer
from train import data
from train.data.dataset import Dataset

GOOD = [f"document number {n} with some words" for n in range(30)]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "good.txt"
    path.write_text("\n\n".join(GOOD), encoding="utf-8")
    return path


def build(*sources: data.Source, seq_len: int = 16, **changes: object) -> Dataset:
    chosen: dict = {"eval_fraction": 0.0, **changes}
    sizes = {"seed": 1, "batch_size": 4, **chosen.pop("sizes", {})}
    config = data.DataConfig(sources=sources, **chosen)
    return data.build(config, seq_len=seq_len, **sizes)


def paragraphs(*paths: Path) -> data.Text:
    return data.Text(paths=tuple(map(str, paths)), separator="\n\n")


# Case 13


def other_tokenizer(tmp_path: Path) -> data.TokenizerFiles:
    ByteTokenizer().save(tmp_path / "tokenizer")
    settings = tmp_path / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": "<|eos|>"}), encoding="utf-8")
    return data.TokenizerFiles(path=str(tmp_path / "tokenizer"))


def test_state_of_other_data_names_what_differs(text_file: Path):
    more = text_file.with_name("more.txt")
    more.write_text("\n\n".join(GOOD[:5]), encoding="utf-8")
    changed = text_file.with_name("changed.txt")
    changed.write_text("\n\n".join(GOOD).replace("30", "31") + "!", encoding="utf-8")
    source = paragraphs(text_file)
    state = json.loads(json.dumps(build(source).state(7)))
    others = {
        "seed": build(source, sizes={"seed": 2}),
        "batch_size": build(source, sizes={"batch_size": 8}),
        "seq_len": build(source, seq_len=32),
        "files": build(paragraphs(changed)),
        "tokenizer": build(source, tokenizer=other_tokenizer(text_file.parent)),
        "mixture": build(source, source),
        "packing": build(source, document_mask=False),
        "held_out": build(source, eval_fraction=0.2),
        "on_bad_record": build(source, on_bad_record="skip"),
    }
    assert set(others) == set(state["fingerprint"])
    for name, dataset in others.items():
        with pytest.raises(DataError, match=f"\n  {name}: .* in the checkpoint, .* now"):
            dataset.check_state(state)
    with pytest.raises(DataError, match="files: "):
        build(paragraphs(text_file, more)).check_state(state)
    assert build(source).check_state(state) == 7


def test_all_differences_are_named_at_once(text_file: Path):
    source = paragraphs(text_file)
    state = build(source).state(3)
    other = build(source, source, seq_len=8, sizes={"seed": 9, "batch_size": 2})
    with pytest.raises(DataError) as caught:
        other.check_state(state)
    for name in ("seed: 1 in the checkpoint, 9 now", "batch_size", "seq_len", "mixture", "files"):
        assert name in str(caught.value)


@pytest.mark.parametrize("state", [{}, {"step": 3}, {"next_index": 7}, {"fingerprint": {}}])
def test_foreign_state(state: dict, text_file: Path):
    with pytest.raises(DataError, match="not written by this pipeline"):
        build(paragraphs(text_file)).check_state(state)


def test_rows_that_show_nothing_but_prompts_are_refused(tmp_path: Path):
    """Every step would be skipped for want of a target, and the run end as if it had trained."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"p": "a long question", "r": "yes"}))
    source = data.Jsonl(paths=(str(path),), prompt_key="p", response_key="r")
    whole = {"packing": "padded"}
    with pytest.raises(DataError, match="seq_len=16: the shortest prompt takes 16 tokens"):
        build(source, seq_len=16, **whole).check_targets()
    build(source, seq_len=17, **whole).check_targets()
    build(source, seq_len=16).check_targets()  # packed: the response is in another row


# Case 14

BAD_LINES = {
    "invalid JSON": b'{"text": "never closed',
    "invalid JSON (nested too deeply)": b"[" * 100_000,
    "invalid UTF-8": b'{"text": "\xff\xfe"}',
    "no field 'text'": b'{"body": "x"}',
    "no field 'text' (no object)": b'["text"]',
    "field 'text' is not text": b'{"text": 3}',
    "field 'text' is a zero-length document": b'{"text": ""}',
    "field 'text' is a zero-length document (blank)": b'{"text": " \\n"}',
    "field 'text' is not valid Unicode": b'{"text": "\\ud800"}',
}


@pytest.fixture(params=BAD_LINES)
def bad_jsonl(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps({"text": text}).encode() for text in GOOD]
    lines[10:10] = [BAD_LINES[request.param], b""]
    path.write_bytes(b"\n".join(lines))
    return path, request.param.partition(" (")[0]


def test_bad_record_stops_with_its_place(bad_jsonl: tuple[Path, str]):
    path, reason = bad_jsonl
    with pytest.raises(DataError, match=rf"bad\.jsonl:11: {reason}.*on_bad_record: skip"):
        build(data.Jsonl(paths=(str(path),), text_key="text"))


def test_bad_record_is_skipped_and_counted(
    bad_jsonl: tuple[Path, str], caplog: pytest.LogCaptureFixture
):
    path, reason = bad_jsonl
    dataset = build(data.Jsonl(paths=(str(path),), text_key="text"), on_bad_record="skip")
    assert dataset.stats["train_documents"] == 30
    assert list(dataset.stats["skipped"].values()) == [1]
    assert next(iter(dataset.stats["skipped"])).startswith(reason)
    assert "bad.jsonl:11" in caplog.text
    check_shapes(dataset)


def check_shapes(dataset: Dataset) -> None:
    for step in range(12):
        shapes = {(v.shape, v.dtype.name) for v in dataset.batch(step).values()}
        assert shapes == {((4, 16), "int32"), ((4, 16), "bool")}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.txt", b""),
        ("latin.txt", "Grüße".encode("latin-1")),
        ("broken.txt.gz", gzip.compress(b"some text " * 100, mtime=0)[:-20]),
        ("not.txt.gz", b"this is not gzip"),
    ],
)
@pytest.mark.parametrize("policy", ["skip", "error"])
def test_bad_files(text_file: Path, name: str, content: bytes, policy: str):
    bad = text_file.with_name(name)
    bad.write_bytes(content)
    source = paragraphs(text_file, bad)
    if policy == "error":
        with pytest.raises(DataError, match=name):
            build(source)
        return
    dataset = build(source, on_bad_record="skip")
    assert dataset.stats["train_documents"] == 30
    assert sum(dataset.stats["skipped"].values()) == 1
    check_shapes(dataset)


def test_invalid_utf8_costs_one_document(text_file: Path):
    raw = text_file.read_bytes().replace(b"number 7 ", b"number \xe2\x82 ")
    text_file.write_bytes(raw)
    place = len("\n\n".join(GOOD[:7])) + 2
    with pytest.raises(DataError, match=f"at byte {place}: invalid UTF-8"):
        build(paragraphs(text_file))
    dataset = build(paragraphs(text_file), on_bad_record="skip")
    assert dataset.stats["train_documents"] == 29


def test_byte_order_mark_and_windows_lines(tmp_path: Path):
    path = tmp_path / "windows.txt"
    path.write_bytes("\ufefffirst\r\n---\r\nsecond\r\n".encode())
    source = data.Text(paths=(str(path),), separator="---")
    dataset = build(source, packing="padded", shuffle=False)
    texts = [dataset.tokenizer.decode(dataset.parts[0].train.document(n)) for n in range(2)]
    assert texts == ["first", "second"]


def test_document_of_ten_contexts_spans_rows(tmp_path: Path):
    path = tmp_path / "long.txt"
    text = "0123456789abcdef" * 10
    path.write_text(f"short\n\n{text}\n\nend", encoding="utf-8")
    dataset = build(paragraphs(path), shuffle=False)
    batches = [dataset.batch(step) for step in range(3)]
    stream = np.concatenate([batch["tokens"].ravel() for batch in batches])
    shown = dataset.tokenizer.decode(stream[: dataset.num_tokens], skip_special=False)
    assert shown == f"short<|eos|>{text}<|eos|>end<|eos|>"
    assert int(batches[1]["positions"].max()) == 15
    check_shapes(dataset)
    padded = build(paragraphs(path), packing="padded")
    assert padded.stats["truncated_tokens"] == 160 + 1 - 16
    check_shapes(padded)


def test_special_text_in_a_document_is_text(tmp_path: Path):
    path = tmp_path / "tricky.txt"
    path.write_text("before <|eos|> after <|bos|>\n\nnext", encoding="utf-8")
    for tokenizer in (data.Bytes(), data.TrainedBPE(vocab_size=265), other_tokenizer(tmp_path)):
        dataset = build(paragraphs(path), tokenizer=tokenizer, shuffle=False)
        document = dataset.parts[0].train.document(0).tolist()
        assert document.count(dataset.tokenizer.eos_id) == 1
        assert dataset.tokenizer.decode(document) == "before <|eos|> after <|bos|>"


@pytest.mark.parametrize("content", [b"\n\n \n\n", b"\n"])
def test_empty_dataset_is_an_error(tmp_path: Path, content: bytes):
    path = tmp_path / "blank.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match="no training document"):
        build(paragraphs(path), on_bad_record="skip")
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"no training document.*'empty file': 1"):
        build(paragraphs(path), on_bad_record="skip")
    with pytest.raises(DataError, match=r"blank\.txt: empty file"):
        build(data.Text(paths=(str(path),)))


def test_missing_files(tmp_path: Path):
    with pytest.raises(DataError, match=r"no file matches .*absent\*\.txt"):
        build(data.Text(paths=(str(tmp_path / "absent*.txt"),)))


def test_held_out_part_that_cannot_be(text_file: Path):
    source = data.Text(paths=(str(text_file),))
    with pytest.raises(DataError, match="eval_split: tail"):
        build(source, eval_fraction=0.02)
    assert build(source, eval_fraction=0.02, eval_split="tail").stats["eval_documents"] == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([1, 2, 260], np.uint16), r"ids 1\.\.260 outside \[0, 260\)"),
        (np.array([1, -2], np.int32), r"ids -2\.\.1 outside"),
        (np.array([[1, 2]], np.int32), "one-dimensional"),
        (np.array([1.0]), "one-dimensional"),
    ],
)
def test_bad_token_files(tmp_path: Path, ids: np.ndarray, message: str):
    np.save(tmp_path / "ids.npy", ids)
    with pytest.raises(DataError, match=message):
        build(data.Tokens(paths=(str(tmp_path / "ids.npy"),)))


def test_damaged_token_files(tmp_path: Path):
    good = data.Tokens(paths=(str(tmp_path / "ids.*"),))
    for name, content in [("ids.bin", b"123"), ("ids.npy", b"\x93NUMPY\x01")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="is no array of uint16 token ids"):
            build(good)
        (tmp_path / name).unlink()
    np.save(tmp_path / "ids.npy", np.array([{"a": 1}], object))
    with pytest.raises(DataError, match="is no array of uint16 token ids"):
        build(good)


def test_tokens_cannot_train_a_tokenizer(tmp_path: Path):
    np.save(tmp_path / "ids.npy", np.arange(100))
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        build(data.Tokens(paths=(str(tmp_path / "ids.npy"),)), tokenizer=data.TrainedBPE())


def test_bad_parquet(tmp_path: Path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = arrow.table({"text": ["one", None, "", "two"], "id": [1, 2, 3, 4]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 damaged")
    paths = (str(tmp_path / "*.parquet"),)
    dataset = build(data.Parquet(paths=paths), on_bad_record="skip")
    assert dataset.stats["train_documents"] == 2
    assert sum(dataset.stats["skipped"].values()) == 3
    with pytest.raises(DataError, match="row 2"):
        build(data.Parquet(paths=paths))
    with pytest.raises(DataError, match=r"no column 'body'.*\['text', 'id'\]"):
        build(data.Parquet(paths=paths, text_key="body"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data.Text(paths=()), "must be a list"),
        (lambda: data.Text(paths="a.txt"), "must be a list"),  # pyright: ignore
        (lambda: data.Corpus(weight=0), "weight=0"),
        (lambda: data.Corpus(weight=float("nan")), "weight=nan"),
        (lambda: data.Jsonl(paths=("a",)), "alone"),
        (lambda: data.Jsonl(paths=("a",), prompt_key="p"), "together"),
        (lambda: data.Jsonl(paths=("a",), text_key="t", response_key="r"), "together"),
        (
            lambda: data.Jsonl(paths=("a",), text_key="t", prompt_key="p", response_key="r"),
            "together",
        ),
        (lambda: data.TrainedBPE(vocab_size=100), "vocab_size=100"),
        (lambda: data.TrainedBPE(min_frequency=0), "min_frequency=0"),
        (lambda: data.DataConfig(sources=()), "sources is empty"),
        (lambda: data.DataConfig(eval_fraction=1.0), "eval_fraction=1.0"),
    ],
)
def test_bad_configurations(make: object, message: str):
    with pytest.raises(ValueError, match=message):
        make()  # pyright: ignore


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"seq_len": 1}, "seq_len=1"),
        ({"process_count": 3}, "use 6"),
        ({"process_index": 2, "process_count": 2}, "process_index=2"),
    ],
)
def test_bad_sizes(text_file: Path, sizes: dict[str, int], message: str):
    chosen: dict = {"seed": 0, "batch_size": 4, "seq_len": 16, **sizes}
    with pytest.raises(ValueError, match=message):
        data.build(data.DataConfig(sources=(paragraphs(text_file),)), **chosen)


@pytest.mark.parametrize("step", [-1, 1.0, True, None])
def test_bad_step(text_file: Path, step: object):
    with pytest.raises(ValueError, match="step="):
        build(paragraphs(text_file)).batch(step)  # pyright: ignore[reportArgumentType]
