# SPDX-License-Identifier: Apache-2.0
"""Fields as training data: every batch against the archive, resuming, splits, bad configs."""

import json

import numpy as np
import pytest

from sqzjax import config as configs
from sqzjax.errors import ConfigError, DataError
from sqzjax.fields import Period, open_archive, statistics, statistics_for
from sqzjax.sphere.grid import Grid
from tests import tolerances as tol
from tests.sqzjax import weather
from train.data.fields import STATISTICS, FieldDataset
from train.data.fields_config import FieldData

CHANNELS = ("temperature_850", "surface_pressure")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(weather.write(weather.make(), tmp_path_factory.mktemp("store") / "a.zarr"))


def build(store, *, seed=3, batch_size=4, window=3, rank=(0, 1), folders=None, **settings):
    held_out = {"valid": (Period(start=0.8),), "test": ()}
    settings = {"channels": CHANNELS, "eval_samples": 3} | held_out | settings
    return FieldDataset(
        FieldData(path=store, **settings),
        seed=seed,
        batch_size=batch_size,
        window=window,
        **(folders or {}),
        process_index=rank[0],
        process_count=rank[1],
    )


def starts_of(dataset, batch):
    """The time at which each sample starts: temperature rises by 1 per time."""
    physical = dataset.statistics.denormalise(batch["fields"][:, 0])
    return np.round(physical[:, 0].mean((1, 2)) - 250).astype(int)


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def test_a_batch_holds_consecutive_normalised_states_and_constants(store):
    dataset = build(store)
    batch = dataset.batch(2)
    assert {k: v.dtype for k, v in batch.items()} == {
        name: np.dtype(dtype) for name, (_, dtype) in dataset.columns.items()
    }
    assert {k: v.shape for k, v in batch.items()} == {
        name: (4, *shape) for name, (shape, _) in dataset.columns.items()
    }
    archive = open_archive(store, channels=CHANNELS)
    known = statistics_for(archive, range(32))
    for row, start in enumerate(starts_of(dataset, batch)):
        states = archive.read(range(start, start + 3)).astype(np.float64)
        normal = (states - known.mean[:, None, None]) / known.std[:, None, None]
        np.testing.assert_allclose(batch["fields"][row], normal, atol=tol.NORMALISED_FIELD)
    assert np.array_equal(batch["constants"][1], archive.constants())
    assert batch["weight"].tolist() == [1.0] * 4
    assert dataset.grid == Grid(latitudes=8, longitudes=16, layout="cells")
    assert dataset.channels == CHANNELS and len(dataset.constant_names) == 3


def test_steps_longer_than_the_interval_of_the_archive(store):
    dataset = build(store, step_hours=12)
    assert len(dataset.samples(dataset.config.train)) == 32 - 2 * (3 - 1)
    states = dataset.statistics.denormalise(dataset.batch(0)["fields"])[:, :, 0].mean((2, 3))
    assert np.all(np.abs(np.diff(states, axis=1) - 2) < 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_epoch_shows_every_sample_once_in_an_order_of_its_own(store, seed):
    dataset = build(store, seed=seed, batch_size=5)  # 30 samples: six steps
    orders = []
    for epoch in range(3):
        steps = range(6 * epoch, 6 * epoch + 6)
        orders.append(np.concatenate([starts_of(dataset, dataset.batch(s)) for s in steps]))
        assert sorted(orders[-1]) == list(range(30))
        assert dataset.epochs(6 * epoch) == (float(epoch),)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], np.sort(orders[0]))


def test_batches_go_over_the_end_of_an_epoch(store):
    dataset = build(store, batch_size=7)
    starts = np.concatenate([starts_of(dataset, dataset.batch(step)) for step in range(9)])
    assert sorted(starts[:30]) == sorted(starts[30:60]) == list(range(30))


def test_without_shuffling_samples_come_in_order(store):
    dataset = build(store, shuffle=False, batch_size=8)
    assert starts_of(dataset, dataset.batch(1)).tolist() == list(range(8, 16))


def test_a_run_resumes_at_every_step(store, tmp_path):
    first = build(store, folders={"cache_dir": tmp_path})
    batches = [first.batch(step) for step in range(12)]
    state = json.loads(json.dumps(first.state(5)))
    again = build(store, folders={"cache_dir": tmp_path})
    assert again.check_state(state) == 5
    for step in reversed(range(12)):
        assert same(again.batch(step), batches[step])
    with again.prefetch(5, 9) as prefetched:
        assert [(step, same(batch, batches[step])) for step, batch in prefetched] == [
            (step, True) for step in range(5, 9)
        ]


def test_other_data_are_refused_on_resuming(store):
    state = build(store).state(1)
    changes = [
        {"seed": 4},
        {"batch_size": 8},
        {"channels": ("surface_pressure",)},
        {"step_hours": 12},
        {"constants": ("orography",)},
        {"shuffle": False},
        {"train": (Period(stop=0.75),)},
    ]
    for change in changes:
        with pytest.raises(DataError, match=next(iter(change)).split("_")[0][:4]):
            build(store, **change).check_state(state)


def test_another_archive_at_the_same_path_is_refused_on_resuming(tmp_path):
    path, folders = tmp_path / "a.zarr", {"cache_dir": tmp_path / "data"}
    state = build(str(weather.write(weather.make(), path)), folders=folders).state(1)
    weather.write(weather.make(seed=1), path)
    with pytest.raises(DataError, match=r"(?s)archive: .*statistics: "):
        build(str(path), folders=folders).check_state(state)
    changed = weather.make()
    changed["land_sea_mask"] = 1 - changed.land_sea_mask
    weather.write(changed, path)
    with pytest.raises(DataError, match=r"constants: ") as caught:
        build(str(path), folders=folders).check_state(state)
    assert "archive: " not in str(caught.value)
    weather.write(weather.make(), path)
    other = json.loads((tmp_path / "data" / STATISTICS).read_text())
    other["std"] = [2 * number for number in other["std"]]
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(DataError, match="statistics: ") as caught:
        build(str(path), statistics=str(tmp_path / "other.json")).check_state(state)
    assert "archive: " not in str(caught.value)


def test_a_branch_takes_over_the_statistics_of_its_run(store, tmp_path, monkeypatch):
    folders = {"cache_dir": tmp_path / "branch", "parent_dir": tmp_path / "trunk"}
    first = build(store, folders={"cache_dir": tmp_path / "trunk"})
    with monkeypatch.context() as patched:
        patched.setattr(statistics, "compute", None)
        branch = build(store, window=5, folders=folders)
    assert branch.statistics.digest == first.statistics.digest
    assert (tmp_path / "branch" / STATISTICS).exists()
    shorter = build(store, train=(Period(stop=0.5),), folders=folders)
    assert shorter.statistics.digest != first.statistics.digest


def test_a_branch_may_take_longer_samples(store):
    state = build(store).state(7)
    longer = build(store, window=5)
    with pytest.raises(DataError, match="window"):
        longer.check_state(state)
    assert longer.check_state(state, branch=True) == 7


def test_archives_in_memory_and_on_disk_give_the_same_batches(store):
    memory, disk = build(store), build(store, in_memory_bytes=0)
    assert memory.stats["in_memory"] and not disk.stats["in_memory"]
    assert all(same(memory.batch(step), disk.batch(step)) for step in range(4))
    assert all(map(same, memory.eval_batches(2), disk.eval_batches(2)))


def test_processes_read_their_own_rows(store):
    whole = build(store).batch(3)
    parts = [build(store, rank=(index, 2)).batch(3) for index in range(2)]
    for name, values in whole.items():
        assert np.array_equal(np.concatenate([part[name] for part in parts]), values)


def test_evaluation_reads_a_fixed_subset_of_held_out_time_and_pads(store):
    dataset = build(store, eval_samples=3)
    batches = list(dataset.eval_batches(2))
    assert [batch["weight"].tolist() for batch in batches] == [[1.0, 1.0], [1.0, 0.0]]
    assert starts_of(dataset, batches[0]).tolist() == [32, 34]
    assert starts_of(dataset, batches[1])[0] == 37  # of the last window of times 32..39
    assert not batches[1]["fields"][1].any()
    other = build(store, seed=9, eval_samples=3)
    assert all(same(a, b) for a, b in zip(other.eval_batches(2), batches, strict=True))


def test_training_never_shows_held_out_time(store):
    dataset = build(store, window=4)
    seen = np.concatenate([starts_of(dataset, dataset.batch(step)) for step in range(20)])
    assert seen.max() + 3 <= 31


def test_statistics_are_of_the_training_period_and_stored(store, tmp_path):
    dataset = build(store, folders={"cache_dir": tmp_path})
    archive = open_archive(store, channels=CHANNELS)
    wanted = archive.read(slice(0, 32)).astype(np.float64).mean((0, 2, 3))
    stored = json.loads((tmp_path / STATISTICS).read_text())
    np.testing.assert_allclose(stored["mean"], wanted, rtol=tol.STATISTICS_REL)
    subset = build(store, channels=("sp",), statistics=str(tmp_path / STATISTICS))
    assert subset.statistics.mean[0] == dataset.statistics.mean[1]
    few = build(store, statistics_states=4)
    wanted = archive.read([0, 10, 21, 31]).astype(np.float64).mean((0, 2, 3))
    np.testing.assert_allclose(few.statistics.mean, wanted, rtol=tol.STATISTICS_REL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_hours": 0}, "step_hours=0 must be an integer >= 1"),
        ({"channels": ["t_850", "temperature_850"]}, "once"),
        ({"train": []}, "train is empty"),
        ({"train": [{"start": 0.5, "stop": 0.1}]}, "must come before"),
        ({"valid": [{"start": "soon"}]}, "ISO date"),
        ({"valid": []}, "needs a period in valid"),
        ({"channels": ["a", "a"]}, "once"),
        ({"constants": ["mountains"]}, "land_sea_mask"),
        ({"missing": "ignore"}, "error, fill"),
        ({"statistics_states": 1}, ">= 2"),
        ({"path": ""}, "path is empty"),
        ({"chanels": ["a"]}, "did you mean 'channels'"),
    ],
)
def test_bad_configs_are_refused_before_anything_is_read(settings, message):
    with pytest.raises(ConfigError, match=message):
        configs.load(FieldData, {"kind": "fields", "path": "a.zarr", **settings})


def test_a_config_survives_dump_and_load(tmp_path):
    path = tmp_path / "data.yaml"
    path.write_text(
        "kind: fields\npath: gs://bucket/a.zarr\nstorage_options: {token: anon}\n"
        "train: [{stop: '2017'}, {start: '2018', stop: 0.9}]\nchannels: [t_850]\n"
        "valid: [{start: 2017-01-01, stop: 2018-01-01}]\ntest: []\n"
    )
    loaded = configs.load(FieldData, path)
    assert loaded.storage_options == {"token": "anon"} and loaded.train[0] == Period(stop="2017")
    assert loaded.valid == (Period(start="2017-01-01", stop="2018-01-01"),)
    again = tmp_path / "again.yaml"
    again.write_text(configs.dump(loaded))
    assert configs.load(FieldData, again) == loaded and hash(loaded) == hash(loaded)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": (Period(stop=0.05),)}, "train: no 3 states 6 h apart"),
        ({"step_hours": 5}, "step_hours"),
        ({"valid": (Period(start=0.7, stop=0.9),)}, "train and valid share"),
        ({"valid": (Period(start="2030"),)}, "valid: no"),
        ({"valid": (Period(start=0.8, stop=0.9),), "test": (Period(start=0.85),)}, "test"),
        ({"train": (Period(start="2018", stop=0.1),)}, "ends before it begins"),
        ({"drop_south_pole": True}, "drop_south_pole"),
        ({"statistics": "nowhere.json"}, "holds no statistics"),
        ({"channels": ("humidity",)}, "no channel"),
    ],
)
def test_configs_that_do_not_suit_the_archive_are_refused(store, settings, message):
    with pytest.raises(DataError, match=message):
        build(store, **settings)


def test_wrong_sizes_are_refused(store):
    with pytest.raises(ValueError, match="use 4"):
        build(store, batch_size=3, rank=(0, 2))
    for rank in ((2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="process_index"):
            build(store, rank=rank)
    with pytest.raises(ValueError, match="batch_size=0"):
        list(build(store).eval_batches(0))
    with pytest.raises(ValueError, match="step_hours=True"):
        FieldData(path="a.zarr", step_hours=True)
    assert not list(build(store, valid=(), eval_samples=0).eval_batches())
    with pytest.raises(ValueError, match="window=0"):
        build(store, window=0)
    with pytest.raises(ValueError, match="step=-1"):
        build(store).batch(-1)


def test_missing_values_stop_a_run_or_become_the_mean(tmp_path):
    dataset = weather.make()
    dataset.temperature[:, :, 2, 3] = np.nan
    path = str(weather.write(dataset, tmp_path / "gaps.zarr"))
    with pytest.raises(DataError, match="missing: fill"):
        build(path)
    # Nothing is read of the time that is only kept apart.
    dataset.temperature[:36, :, 2, 3] = 0.0
    split = {"valid": (Period(start=0.8, stop=0.9),), "test": (Period(start=0.9),)}
    later = build(str(weather.write(dataset, tmp_path / "later.zarr")), **split)
    assert later.stats["in_memory"] and len(list(later.eval_batches())) == 1
    filled = build(path, missing="fill").batch(0)["fields"]
    assert np.all(filled[:, :, 0, 2, 3] == 0) and np.isfinite(filled).all()
