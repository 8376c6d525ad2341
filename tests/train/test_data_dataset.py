# SPDX-License-Identifier: Apache-2.0
"""The pipeline end to end: exact resume (reliability case 12), sharding, caching, real files."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sqzjax.errors import DataError
from sqzjax.io.tokenizer import ByteTokenizer, load
from tests import arrays
from train import data
from train.data import sources
from train.data.dataset import Dataset
from train.data.packing import Batch
from train.data.prefetch import Prefetcher
from train.data.prepare import _cached
from train.data.store import cut

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two small sources whose epochs end within a few steps."""
    words = [f"word{n} " * (n % 7 + 1) for n in range(40)]
    (tmp_path / "a.txt").write_text("<|end|>".join(words), encoding="utf-8")
    records = [{"question": f"what is {n}?", "answer": "so " * (n % 5 + 1)} for n in range(25)]
    lines = "\n".join(json.dumps(record) for record in records)
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def config(files: Path, **changes: object) -> data.DataConfig:
    sources = (
        data.Text(paths=(str(files / "a.txt"),), separator="<|end|>", weight=0.6),
        data.Jsonl(
            paths=(str(files / "b.jsonl"),),
            prompt_key="question",
            response_key="answer",
            weight=0.4,
        ),
    )
    chosen: dict = {"sources": sources, "eval_fraction": 0.1, **changes}
    return data.DataConfig(**chosen)


def build(files: Path, **changes: object) -> Dataset:
    return data.build(
        config(files, **changes), seed=3, batch_size=4, seq_len=32, cache_dir=files / "cache"
    )


def same(left: Batch, right: Batch) -> bool:
    return all(np.array_equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("special", [False, True])
def test_special_tokens_of_a_prompt_are_read_if_asked_for(tmp_path: Path, special: bool):
    """A prompt in a chat template must reach the model as it does in decoding; answers never."""
    folder = tmp_path / "tokenizer"
    ByteTokenizer().save(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eos|>"}))
    record = {"prompt": "<|bos|>Hi<|eos|>", "response": "<|pad|>"}
    (tmp_path / "chat.jsonl").write_text(json.dumps(record))
    source = data.Jsonl(
        paths=(str(tmp_path / "chat.jsonl"),),
        prompt_key="prompt",
        response_key="response",
        prompt_end="",
        prompt_special=special,
    )
    files = data.TokenizerFiles(path=str(folder))
    made = data.DataConfig(sources=(source,), tokenizer=files, eval_fraction=0, packing="padded")
    batch = data.build(made, seed=0, batch_size=1, seq_len=32).batch(0)
    prompt = [256, *b"Hi", 257] if special else list(b"<|bos|>Hi<|eos|>")
    wanted = [*prompt, *b"<|pad|>", 257]
    assert batch["tokens"][0, : len(wanted)].tolist() == wanted
    assert batch["loss_mask"][0].tolist().index(True) == len(prompt)
    with pytest.raises(ValueError, match="prompt_special"):
        data.Jsonl(paths=("a",), text_key="text", prompt_special=True)
    with pytest.raises(ValueError, match="response_end='x' is of responses"):
        data.Jsonl(paths=("a",), text_key="text", response_end="x")
    # The end of a turn is a target, and a token of its own whatever prompts are.
    turns = replace(source, response_end="<|bos|>!")
    made = replace(made, sources=(turns,))
    ended = data.build(made, seed=0, batch_size=1, seq_len=32).batch(0)
    wanted[-1:] = [256, *b"!", 257]
    assert ended["tokens"][0, : len(wanted)].tolist() == wanted
    assert ended["loss_mask"][0, len(prompt) : len(wanted)].all()
    assert sources.fingerprint(turns) != sources.fingerprint(source)


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_resume_at_every_step(files: Path, packing: str):
    first = build(files, packing=packing)
    whole = [first.batch(step) for step in range(22)]
    assert min(first.epochs(20)) > 1, "the run must cross the end of an epoch of each source"
    states = [json.loads(json.dumps(first.state(step))) for step in range(21)]
    for state in states:
        fresh = build(files, packing=packing)
        step = fresh.check_state(state)
        with fresh.prefetch(step, step + 2) as batches:
            for number, batch in batches:
                assert same(batch, whole[number])


def test_epochs_show_every_token_once(files: Path):
    part = config(files).sources[:1]
    dataset = data.build(
        data.DataConfig(sources=part, eval_fraction=0), seed=1, batch_size=5, seq_len=16
    )
    rows = dataset.stats["rows_per_epoch"][0]
    stream = [dataset.batch(step) for step in range(3 * rows // 5 + 1)]
    tokens = np.concatenate([batch["tokens"] for batch in stream])
    real = np.concatenate([batch["segment_ids"] for batch in stream]) >= 0
    wanted = np.bincount(dataset.train_tokens(), minlength=260)
    for epoch in range(3):
        mine = slice(epoch * rows, (epoch + 1) * rows)
        shown = np.bincount(tokens[mine][real[mine]], minlength=260)
        assert np.array_equal(shown, wanted)


def test_processes_share_the_batch(files: Path):
    whole = build(files).batch(7)
    parts = [
        data.build(
            config(files),
            seed=3,
            batch_size=4,
            seq_len=32,
            cache_dir=files / "cache",
            process_index=index,
            process_count=2,
        ).batch(7)
        for index in range(2)
    ]
    assert same({name: np.concatenate([p[name] for p in parts]) for name in whole}, whole)


def test_rows_do_not_depend_on_the_batch_size(files: Path):
    small = data.build(config(files), seed=3, batch_size=2, seq_len=32)
    large = build(files)
    joined = [np.concatenate([small.batch(2 * s)["tokens"], small.batch(2 * s + 1)["tokens"]])
              for s in range(5)]  # fmt: skip
    assert all(np.array_equal(joined[s], large.batch(s)["tokens"]) for s in range(5))


def test_another_process_makes_the_same_batches(files: Path):
    code = (
        "import sys, hashlib\n"
        "import train.data as data\n"
        "source = data.Text(paths=(sys.argv[1],), separator='<|end|>')\n"
        "bpe = data.TrainedBPE(vocab_size=300)\n"
        "config = data.DataConfig(sources=(source,), tokenizer=bpe, eval_fraction=0.1)\n"
        "dataset = data.build(config, seed=3, batch_size=4, seq_len=32)\n"
        "assert 'jax' not in sys.modules\n"
        "rows = b''.join(dataset.batch(s)['tokens'].tobytes() for s in range(9))\n"
        "print(hashlib.sha256(rows).hexdigest(), dataset.fingerprint)\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, str(files / "a.txt")],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and len(outputs.pop()) > 64


def test_second_start_reads_the_cache(files: Path, monkeypatch: pytest.MonkeyPatch):
    first = build(files, tokenizer=data.TrainedBPE(vocab_size=280))
    monkeypatch.setattr("train.data.sources.read", None)
    second = build(files, tokenizer=data.TrainedBPE(vocab_size=280))
    assert second.fingerprint == first.fingerprint
    assert same(second.batch(5), first.batch(5))
    assert second.eval_documents == first.eval_documents


def test_damaged_cache_is_built_again(files: Path):
    first = build(files)
    wanted = first.batch(3)
    for name in ("train.tokens.bin", "train.offsets.npy", "meta.json"):
        for file in (files / "cache").glob(f"tokens-*/{name}"):
            file.write_bytes(file.read_bytes()[:-1])
        assert same(build(files).batch(3), wanted)
    assert not list((files / "cache").glob("*.tmp"))


def test_interrupted_build_leaves_nothing(files: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("train.data.prepare.Encoder.encode", fail)
        with pytest.raises(KeyboardInterrupt):
            build(files)
    assert not list((files / "cache").iterdir())
    assert build(files).num_tokens


def test_two_processes_may_build_one_entry(tmp_path: Path):
    def build_late(folder: Path) -> None:
        (folder / "file").write_text("second", encoding="utf-8")
        (tmp_path / "entry").mkdir()
        (tmp_path / "entry" / "file").write_text("first", encoding="utf-8")

    folder = _cached(tmp_path / "entry", build_late)
    assert (folder / "file").read_text(encoding="utf-8") == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_prompts_are_no_targets(files: Path):
    source = config(files).sources[1:]
    dataset = data.build(
        data.DataConfig(sources=source, packing="padded", eval_fraction=0, shuffle=False),
        seed=0,
        batch_size=25,
        seq_len=64,
    )
    batch = dataset.batch(0)
    for n in range(25):
        target = batch["tokens"][n][batch["loss_mask"][n]]
        assert dataset.tokenizer.decode(target) == "so " * (n % 5 + 1)
        assert target[-1] == dataset.tokenizer.eos_id
        rest = batch["tokens"][n][~batch["loss_mask"][n]]
        assert dataset.tokenizer.decode(rest) == f"what is {n}?\n"


def test_bos_is_no_target(files: Path):
    source = config(files).sources[:1]
    wanted = data.DataConfig(sources=source, add_bos=True, eval_fraction=0)
    batch = data.build(wanted, seed=0, batch_size=8, seq_len=32).batch(0)
    assert (batch["tokens"] == 256).any()
    assert not batch["loss_mask"][batch["tokens"] == 256].any()


@pytest.mark.parametrize("how", ["hash", "tail"])
def test_held_out_documents(files: Path, how: str):
    dataset = build(files, eval_split=how, eval_fraction=0.25)
    stats = dataset.stats
    assert stats["train_documents"] + stats["eval_documents"] == 65
    assert len(dataset.eval_documents) == stats["eval_documents"] > 5
    assert all(text in dataset.eval_text for text in dataset.eval_documents)
    ids = [token for batch in dataset.eval_batches(3) for token in real_tokens(batch)]
    assert ids == dataset.eval_tokens.tolist()
    pieces = [dataset.tokenizer.encode(text, add_eos=True) for text in dataset.eval_documents]
    assert [token for piece in pieces for token in piece] == ids
    assert {batch["tokens"].shape for batch in dataset.eval_batches(3)} == {(3, 32)}


def real_tokens(batch: Batch) -> list[int]:
    return batch["tokens"][batch["segment_ids"] >= 0].tolist()


def test_tail_of_one_long_text(shared_data: Path):
    path = shared_data / "tinyshakespeare.txt"
    wanted = data.DataConfig(
        sources=(data.Text(paths=(str(path),)),), eval_split="tail", eval_fraction=0.1
    )
    dataset = data.build(wanted, seed=0, batch_size=2, seq_len=64)
    text = path.read_text(encoding="utf-8")
    assert dataset.tokenizer.decode(dataset.train_tokens()) + dataset.eval_text == text
    share = len(dataset.eval_text) / len(text)
    assert 0.1 <= share < 0.101


def test_wikitext_and_gsm8k(shared_data: Path, tmp_path: Path):
    wanted = data.DataConfig(
        sources=(
            data.Text(paths=(str(shared_data / "wikitext2-*.txt"),), separator="\n\n", weight=2),
            data.Jsonl(
                paths=(str(shared_data / "gsm8k-train.jsonl"),),
                prompt_key="question",
                response_key="answer",
            ),
            data.Jsonl(paths=(str(shared_data / "HumanEval.jsonl.gz"),), text_key="prompt"),
        ),
        tokenizer=data.TrainedBPE(vocab_size=1000, max_characters=300_000),
        eval_fraction=0.05,
    )
    dataset = data.build(wanted, seed=0, batch_size=8, seq_len=128, cache_dir=tmp_path)
    lines = (shared_data / "gsm8k-train.jsonl").read_text(encoding="utf-8").count("\n")
    parts = [part.train.num_documents + part.held_out.num_documents for part in dataset.parts]
    assert parts[1:] == [lines, 164]
    batch = dataset.batch(1)
    assert int(batch["tokens"].max()) < dataset.vocab_size <= 1000
    text = dataset.tokenizer.decode(batch["tokens"][0])
    assert dataset.tokenizer.decode(dataset.tokenizer.encode(text)) == text


def test_stories_tokenizer_from_files(shared_data: Path, tmp_path: Path):
    source = data.Text(
        paths=(str(shared_data / "tinystories_sample.txt"),), separator="<|endoftext|>"
    )
    files = data.TokenizerFiles(path=str(shared_data / "stories260K"))
    wanted = data.DataConfig(sources=(source,), tokenizer=files, eval_fraction=0, shuffle=False)
    dataset = data.build(wanted, seed=0, batch_size=5, seq_len=512, cache_dir=tmp_path)
    expected = arrays.load(shared_data / "stories260K" / "expected.npz")
    lengths = dataset.parts[0].train.lengths
    # The counts of the reference, and the bos that this tokenizer adds, and our eos.
    assert lengths.tolist() == (expected["story_nll"][:, 1].astype(int) + 2).tolist()


@pytest.mark.parametrize("kind", ["npy", "bin"])
def test_token_files(tmp_path: Path, kind: str):
    ids = np.array([5, 6, 257, 7, 257, 8, 9, 10], np.uint16)
    path = tmp_path / f"ids.{kind}"
    np.save(path, ids) if kind == "npy" else ids.tofile(path)
    source = data.Tokens(paths=(str(path),))
    wanted = data.DataConfig(sources=(source,), eval_fraction=0, shuffle=False)
    dataset = data.build(wanted, seed=0, batch_size=2, seq_len=4)
    assert dataset.batch(0)["tokens"].tolist() == [[5, 6, 257, 7], [257, 8, 9, 10]]
    assert dataset.batch(0)["segment_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    tail = data.DataConfig(sources=(source,), eval_fraction=0.4, eval_split="tail")
    assert data.build(tail, seed=0, batch_size=2, seq_len=4).eval_documents == ("\b\t\n",)


def test_parquet(tmp_path: Path):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"document {n}" for n in range(3000)]
    parquet.write_table(
        arrow.table({"text": texts, "id": list(range(3000))}), tmp_path / "x.parquet"
    )
    source = data.Parquet(paths=(str(tmp_path / "*.parquet"),))
    dataset = data.build(data.DataConfig(sources=(source,)), seed=0, batch_size=2, seq_len=16)
    assert dataset.stats["train_documents"] + dataset.stats["eval_documents"] == 3000


def test_folders_and_compression_do_not_change_the_documents(files: Path):
    other = files / "elsewhere"
    other.mkdir()
    for name in ("a.txt", "b.jsonl"):
        (other / name).write_bytes((files / name).read_bytes())
    assert build(other).fingerprint == build(files).fingerprint
    with gzip.open(files / "a.txt.gz", "wb") as stream:
        stream.write((files / "a.txt").read_bytes())
    plain, packed = (
        data.build(
            data.DataConfig(
                sources=(data.Text(paths=(str(path),), separator="<|end|>"),), eval_fraction=0
            ),
            seed=0,
            batch_size=2,
            seq_len=16,
        )
        for path in (files / "a.txt", files / "a.txt.gz")
    )
    assert same(plain.batch(2), packed.batch(2))


def test_long_texts_are_cut_without_loss():
    text = "some words and\nlines " * 50 + "x" * 100
    pieces = cut(text, 64)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 64
    assert all(piece[0] in " \n" for piece in pieces[1:-2])


def test_temporary_files_live_as_long_as_the_dataset(files: Path):
    dataset = data.build(config(files), seed=0, batch_size=2, seq_len=16)
    folder = dataset.parts[0].texts_file.parent.parent
    assert folder.is_dir()
    del dataset
    assert not folder.exists()


def test_prefetch_surfaces_errors_after_the_good_batches():
    def batch(step: int) -> int:
        if step == 3:
            raise DataError("damaged row")
        return step * step

    with Prefetcher(batch, 1) as batches:
        assert [next(batches), next(batches)] == [(1, 1), (2, 4)]
        with pytest.raises(DataError, match="damaged row"):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)


def test_prefetch_ends_its_thread():
    before = threading.active_count()
    batches = Prefetcher(lambda step: step, 0)
    assert next(batches) == (0, 0)
    batches.close()
    batches.close()
    assert threading.active_count() == before
    assert list(Prefetcher(lambda step: step, 5, 8)) == [(5, 5), (6, 6), (7, 7)]
    assert threading.active_count() == before


def test_tokenizer_argument_replaces_the_configured_one(files: Path):
    wanted = config(files, tokenizer=data.TokenizerFiles(path="absent"))
    dataset = data.build(wanted, seed=0, batch_size=2, seq_len=16, tokenizer=load("bytes"))
    assert dataset.vocab_size == 260


def test_batches_are_fixed_for_ever(files: Path):
    """A change here would make old checkpoints resume with other data."""
    dataset = build(files)
    rows = b"".join(dataset.batch(step)["tokens"].tobytes() for step in range(20))
    assert hashlib.sha256(rows).hexdigest()[:16] == "3f68d4c98136ee29"
