# SPDX-License-Identifier: Apache-2.0
"""Recordings that are killed, damaged, half there, or of another teacher; exact resume of data."""

from dataclasses import replace

import numpy as np
import pytest

from sqzjax.errors import DataError
from sqzjax.io import manifest
from sqzjax.io import tokenizer as tokenizers
from tests.train.test_cdlm import recording
from train import collect
from train.data import TrajectoryData, TrajectoryDataset
from train.data.trajectory_store import (
    HIDDEN,
    TOKENIZER,
    Header,
    StoreWriter,
    TrajectoryStore,
    shard_folder,
)

LENGTH, WIDTH, SIZE, SHARDS = 8, 6, 4, (5, 5, 3)


def header(**origin):
    settings = {
        "length": LENGTH,
        "block_size": 4,
        "hidden_size": SIZE,
        "mask_token": 259,
        "prompt_width": WIDTH,
    }
    return Header({"teacher": "one", "seed": "0", **origin}, settings, SHARDS)


def arrays(number):
    rng, rows = np.random.default_rng(number), SHARDS[number]
    lengths = rng.integers(2, WIDTH + 1, rows).astype(np.int32)
    count = (lengths + LENGTH) // 4 * 4 - lengths
    inside = np.arange(LENGTH) < count[:, None]
    prompt = rng.integers(0, 250, (rows, WIDTH)) * (np.arange(WIDTH) < lengths[:, None])
    return {
        "prompt": prompt.astype(np.int32),
        "prompt_length": lengths,
        "tokens": np.where(inside, rng.integers(0, 250, (rows, LENGTH)), 0),
        "rank": np.where(inside, np.arange(LENGTH), -1),
        "hidden": rng.normal(size=(rows, LENGTH, SIZE)).astype(HIDDEN),
        "reference": rng.integers(0, 250, (rows, LENGTH)),
        "reference_length": np.full(rows, 3),
    }


def fill(folder, numbers=range(len(SHARDS))):
    writer = StoreWriter(folder, header())
    tokenizers.load("bytes").save(folder / TOKENIZER)
    for number in numbers:
        writer.write(number, arrays(number))
    return writer


def dataset(folder, **changes):
    config = TrajectoryData(path=str(folder), **{"eval_fraction": 0.3, **changes})
    return TrajectoryDataset(config, seed=1, batch_size=4, seq_len=16)


def test_what_is_written_is_read(tmp_path):
    fill(tmp_path)
    store = TrajectoryStore(tmp_path)
    assert len(store) == sum(SHARDS)
    for row in range(len(store)):
        shard = 0 if row < 5 else 1 if row < 10 else 2
        wanted = arrays(shard)
        for name, value in store.row(row).items():
            np.testing.assert_array_equal(value, wanted[name][row - (0, 5, 10)[shard]])
    assert store.row(0)["hidden"].dtype == HIDDEN


@pytest.mark.parametrize("moment", ["array", "rename", "manifest"])
def test_killed_in_mid_write(tmp_path, monkeypatch, moment):
    """A shard counts when its manifest is there; until then it is missing, and is made anew."""
    writer = fill(tmp_path, [0])

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "array":
            save, saved = np.save, []
            patch.setattr(
                np, "save", lambda *a: killed() if len(saved) > 3 else saved.append(save(*a))
            )
        else:
            owner = manifest if moment == "manifest" else type(tmp_path)
            patch.setattr(owner, "write" if moment == "manifest" else "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.write(1, arrays(1))
    writer = StoreWriter(tmp_path, header())
    assert writer.missing() == ([1, 2], [])
    with pytest.raises(DataError, match="lacks 2 of 3 shards; repeat the command"):
        TrajectoryStore(tmp_path)
    for number in (1, 2):
        writer.write(number, arrays(number))
    assert writer.missing() == ([], [])
    np.testing.assert_array_equal(TrajectoryStore(tmp_path).row(5)["rank"], arrays(1)["rank"][0])


@pytest.mark.parametrize("damage", ["cut", "flip", "lost"])
def test_torn_shards_are_found(tmp_path, damage):
    writer = fill(tmp_path)
    path = shard_folder(tmp_path, 1) / "hidden.npy"
    content = bytearray(path.read_bytes())
    if damage == "lost":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-7])
    else:
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged(.|\n)*hidden\.npy"):
        TrajectoryStore(tmp_path)
    todo, problems = writer.missing()
    assert todo == [1] and "hidden.npy" in problems[0]
    writer.write(1, arrays(1))
    assert len(TrajectoryStore(tmp_path)) == 13


def test_other_stores_are_refused(tmp_path):
    fill(tmp_path)
    with pytest.raises(DataError, match="teacher: 'one' in the store, 'two' now"):
        StoreWriter(tmp_path, header(teacher="two"))
    with pytest.raises(DataError, match="block_size: 4 in the store, 8 now"):
        mine = header()
        StoreWriter(tmp_path, replace(mine, settings={**mine.settings, "block_size": 8}))
    with pytest.raises(DataError, match="holds no trajectories"):
        TrajectoryStore(tmp_path / "elsewhere")
    (tmp_path / "store.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="format 99"):
        TrajectoryStore(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(DataError, match="unreadable"):
        TrajectoryStore(tmp_path)


def test_batches_are_a_function_of_the_step(tmp_path):
    fill(tmp_path)
    one, other = dataset(tmp_path), dataset(tmp_path)
    wanted = [one.batch(step) for step in range(6)]
    for step in (5, 2):
        for name, array in other.batch(step).items():
            np.testing.assert_array_equal(array, wanted[step][name])
            shape, dtype = one.columns[name]
            assert array.shape == (4, *shape) and array.dtype == dtype
    assert one.check_state(other.state(3)) == 3
    with pytest.raises(DataError, match=r"held_out: '0\.3' in the checkpoint, '0\.5' now"):
        dataset(tmp_path, eval_fraction=0.5).check_state(one.state(3))
    count = one.stats["train_trajectories"]
    assert count + one.stats["eval_trajectories"] == 13
    rows = np.concatenate([batch["prompt_length"] for batch in wanted])[:count]
    trained = [int(one.store.row(int(i))["prompt_length"]) for i in one._train]
    assert sorted(rows) == sorted(trained)  # every trajectory once an epoch
    with pytest.raises(ValueError, match="seq_len=9 is too short"):
        TrajectoryDataset(one.config, seed=1, batch_size=4, seq_len=9)


def test_rows_hold_the_prompt_then_the_response(tmp_path):
    fill(tmp_path)
    data = dataset(tmp_path)
    batch = next(iter(data.eval_batches(2)))
    row = data.store.row(int(data._held_out[0]))
    begin, count = int(row["prompt_length"]), int((row["rank"] >= 0).sum())
    text = [*row["prompt"][:begin], *row["tokens"][:count]]
    assert batch["tokens"][0, : begin + count].tolist() == text
    assert (batch["positions"][0, begin + count :] == -1).all()
    assert batch["rank"][0, begin : begin + count].tolist() == row["rank"][:count].tolist()
    assert (batch["rank"][0, :begin] == -1).all()
    reference = [*row["prompt"][:begin], *row["reference"][:3], *[257] * (count - 3)]
    assert batch["reference"][0, : begin + count].tolist() == reference
    np.testing.assert_array_equal(batch["hidden"][0], row["hidden"])


class Stop:
    """Ask to stop after some batches."""

    def __init__(self, batches):
        self.left = batches

    @property
    def requested(self):
        self.left -= 1
        return self.left < 0


def content(folder):
    store = TrajectoryStore(folder / "trajectories")
    return [store.row(i) for i in range(len(store))]


def test_a_refused_recording_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    config = recording()
    monkeypatch.setattr(collect.Recording, "run", lambda self, writer, preemption: 0)
    assert collect.run(config, workdir=tmp_path) == 0
    left = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(DataError, match="seed: '0' in the store, '1' now"):
        collect.run(replace(config, seed=1), workdir=tmp_path)
    assert (tmp_path / "config.yaml").read_bytes() == left


@pytest.mark.slow
def test_an_interrupted_recording_goes_on(tmp_path, monkeypatch):
    """Stopped in the second shard, continued: what an undisturbed run records, to the bit."""
    config = recording(temperatures=(0.0, 0.9), count=16, shard_size=8)
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert collect.run(config, workdir=whole) == 0
    record = collect.Recording.record
    stop = Stop(1)
    with monkeypatch.context() as patch:
        patch.setattr(
            collect.Recording,
            "record",
            lambda self, params, shard, _: record(self, params, shard, stop),
        )
        assert collect.run(config, workdir=split) == 75
    assert [path.name for path in (split / "trajectories").glob("shard-*")] == ["shard-00000"]
    assert collect.run(config, workdir=split) == 0
    for one, other in zip(content(whole), content(split), strict=True):
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name])
    ranks = np.array([row["rank"] for row in content(whole)])
    greedy, drawn = (
        np.array([row["tokens"] for row in content(whole)[s]])
        for s in (slice(0, 16), slice(16, 32))
    )
    assert (ranks >= 0).sum(1).max() == 7 and (greedy != drawn).any()
    with pytest.raises(DataError, match="seed: '0' in the store, '1' now"):
        collect.run(replace(config, seed=1), workdir=split)
    other = replace(config.model, config=replace(config.model.config, norm_eps=1e-3))
    with pytest.raises(DataError, match="teacher: "):
        collect.run(replace(config, model=other), workdir=split)
