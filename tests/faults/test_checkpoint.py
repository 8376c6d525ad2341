# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: exact round trips, strict matching, placement, retention, background saving."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from sqzjax.errors import CheckpointError
from sqzjax.io import manifest, step_files
from sqzjax.io.checkpoint import Checkpointer, read_meta, restore_params
from tests.faults.checkpoint_toy import abstract, digest, init_state, train_step
from tests.golden.make_checkpoint import golden_items

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture
def saver(tmp_path):
    with Checkpointer(tmp_path / "checkpoints", keep=2) as checkpointer:
        yield checkpointer


def _save(checkpointer, step, items, **meta):
    checkpointer.save(step, items, meta)
    assert checkpointer.wait()


def _error(function, *arguments, **keywords) -> str:
    with pytest.raises(CheckpointError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


# Round trips.


def test_round_trip_is_exact_and_keeps_structure(saver):
    items = train_step(init_state())
    _save(saver, 7, items, config={"lr": 1e-3}, tokens_seen=123)
    restored = saver.restore(None, abstract(items))
    assert restored.step == 7
    assert restored.meta == {"config": {"lr": 1e-3}, "tokens_seen": 123}
    assert jax.tree.structure(restored.items) == jax.tree.structure(items)
    assert digest(restored.items) == digest(items)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored.items))


def test_layout_on_disk_is_documented_one(saver):
    _save(saver, 3, init_state(), note="x")
    folder = saver.directory / "3"
    assert {"params", "opt_state", "train", "meta", manifest.NAME} <= {
        path.name for path in folder.iterdir()
    }
    document = json.loads((folder / "meta" / "metadata").read_text())
    assert document["format_version"] == step_files.FORMAT_VERSION
    assert document["meta"] == {"note": "x"} == read_meta(folder)
    assert document["arrays"]["params"]["layers/mlp/kernel"] == ["float32", [2, 8, 8]]
    assert {"jax", "orbax-checkpoint", "python", "sqzjax"} == set(document["versions"])


def test_plain_orbax_reads_params(saver):
    import orbax.checkpoint as ocp

    params = init_state()["params"]
    _save(saver, 1, {"params": params})
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), params)
    with ocp.PyTreeCheckpointer() as reader:
        plain = reader.restore(saver.directory / "1" / "params", restore_args=arguments)
    assert digest(plain) == digest(params)
    assert jax.tree.structure(plain) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int4", "uint4", "int8", "uint8", "int32", "uint32", "float16", "bfloat16"]
    + ["float8_e4m3fn", "float8_e5m2", "float32", "complex64"],
)
def test_every_dtype_survives(saver, dtype):
    values = np.arange(6).reshape(2, 3).astype(ml_dtypes.finfo("bfloat16").dtype).astype(dtype)
    items = {"params": {"w": jnp.asarray(values), "scalar": jnp.asarray(values[1, 2])}}
    _save(saver, 1, items)
    restored = saver.restore(1, abstract(items)).items
    assert restored["params"]["w"].dtype == dtype
    np.testing.assert_array_equal(np.asarray(restored["params"]["w"]), values)
    np.testing.assert_array_equal(np.asarray(restored["params"]["scalar"]), values[1, 2])


def test_numbers_empty_arrays_and_empty_items(saver):
    train = {"count": 2**40, "loss": 0.1, "done": True, "none": None, "empty": jnp.zeros((0, 3))}
    items = {"train": train, "opt_state": optax.sgd(0.1).init({"w": jnp.zeros(2)})}
    _save(saver, 1, items)
    restored = saver.restore(1, items).items
    assert restored["train"]["count"] == 2**40 and type(restored["train"]["count"]) is int
    assert restored["train"]["loss"] == 0.1 and restored["train"]["done"] is True
    assert restored["train"]["none"] is None
    assert restored["train"]["empty"].shape == (0, 3)
    assert jax.tree.structure(restored) == jax.tree.structure(items)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_random_keys_survive_and_other_kind_is_refused(saver, implementation):
    items = {"train": {"keys": jax.random.split(jax.random.key(3, impl=implementation), 2)}}
    _save(saver, 1, items)
    restored = saver.restore(1, abstract(items)).items["train"]["keys"]
    assert restored.dtype == items["train"]["keys"].dtype
    for ours, theirs in zip(restored, items["train"]["keys"], strict=True):
        np.testing.assert_array_equal(jax.random.bits(ours, (4,)), jax.random.bits(theirs, (4,)))
    other = {"train": {"keys": jax.random.split(jax.random.key(3, impl="unsafe_rbg"), 2)}}
    assert "train/keys: key<" in _error(saver.restore, 1, other, cast=True)


@pytest.mark.parametrize("leaf", ["text", object()])
def test_leaf_that_is_no_array_is_refused(saver, leaf):
    assert "train/x is a" in _error(saver.save, 1, {"train": {"x": leaf}}, {})


def test_names_that_clash_on_disk_are_refused(saver):
    clash = {"a.b": jnp.zeros(1), "a": {"b": jnp.ones(1)}}
    assert "'a/b' clashes" in _error(saver.save, 1, {"params": clash}, {})
    nested = {"a": jnp.zeros(1), "a/b": jnp.ones(1)}
    assert "'a' clashes" in _error(saver.save, 1, {"params": nested}, {})
    assert "item name 'meta'" in _error(saver.save, 1, {"meta": {}}, {})


def test_meta_that_is_no_json_is_refused(saver):
    with pytest.raises(ValueError, match="meta must hold JSON"):
        saver.save(1, init_state(), {"x": jnp.zeros(1)})


def test_donated_buffers_do_not_change_what_is_saved(saver):
    items = init_state()
    for step in range(1, 4):
        expected = digest(items)
        saver.save(step, items, {})
        items = train_step(items)  # overwrites the buffers while the thread is writing
        assert digest(saver.restore(step, abstract(items)).items) == expected


# Placement.


def _spread(items, count):
    mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])

    def place(leaf):
        axes = ["data" if size % count == 0 else None for size in leaf.shape[-1:]]
        spec = jax.P(*[None] * (len(leaf.shape) - 1), *axes)
        return jax.sharding.NamedSharding(mesh, spec)

    return jax.tree.map(place, items)


def test_restore_on_other_device_counts_is_exact(saver):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    items = init_state()
    expected = digest(items)
    for step, count in enumerate((8, 1, 4, 8), start=1):
        shardings = _spread(items, count)
        template = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            items,
            shardings,
        )
        if step == 1:
            items = jax.device_put(items, shardings)
        else:
            items = saver.restore(step - 1, template).items
        assert digest(items) == expected
        assert all(jax.tree.leaves(jax.tree.map(lambda a, s: a.sharding == s, items, shardings)))
        _save(saver, step, items)


def test_restore_without_sharding_is_uncommitted(saver):
    _save(saver, 1, init_state())
    restored = saver.restore(1, init_state()).items
    assert not any(leaf.committed for leaf in jax.tree.leaves(restored))


# Matching.


def test_every_mismatch_is_listed_with_name_and_shape(saver):
    items = init_state()
    _save(saver, 1, items)
    wanted = abstract(items)
    wanted["params"]["embed"]["embedding"] = jax.ShapeDtypeStruct((32, 8), jnp.float32)
    wanted["params"]["head"]["bias"] = jax.ShapeDtypeStruct((16,), jnp.float32)
    wanted["params"]["head"]["kernel"] = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    del wanted["params"]["layers"]
    message = _error(saver.restore, None, wanted)
    for line in (
        "params/embed/embedding: float32[16,8] stored, wanted float32[32,8]",
        "params/head/bias: missing in the checkpoint, wanted float32[16]",
        "params/head/kernel: bfloat16[8,16] stored, wanted float32[8,16] (pass cast=True",
        "params/layers/mlp/kernel: float32[2,8,8] in the checkpoint, not wanted",
    ):
        assert line in message
    assert "stack_layers" not in message


def test_mismatch_list_stops_at_twenty(saver):
    _save(saver, 1, {"params": {f"w{i}": jnp.zeros(2) for i in range(30)}})
    wanted = {"params": {f"w{i}": jax.ShapeDtypeStruct((3,), jnp.float32) for i in range(30)}}
    message = _error(saver.restore, 1, wanted)
    assert message.count("stored, wanted") == 20
    assert "and 10 more" in message


def test_other_optimizer_is_refused(saver):
    items = init_state()
    _save(saver, 1, items)
    wanted = abstract(items | {"opt_state": optax.sgd(0.1, momentum=0.9).init(items["params"])})
    message = _error(saver.restore, 1, wanted)
    assert "opt_state/0/mu/head/kernel: bfloat16[8,16] in the checkpoint, not wanted" in message


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cast_is_explicit(saver, dtype):
    weights = jax.random.normal(jax.random.key(0), (4, 4))
    _save(saver, 1, {"params": {"w": weights}})
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for sharding in (None, device):
        wanted = {"params": {"w": jax.ShapeDtypeStruct((4, 4), "bfloat16", sharding=sharding)}}
        assert "float32[4,4] stored, wanted bfloat16[4,4]" in _error(saver.restore, 1, wanted)
        restored = saver.restore(1, wanted, cast=True).items["params"]["w"]
        np.testing.assert_array_equal(restored, weights.astype("bfloat16"))
    integer = {"params": {"w": jax.ShapeDtypeStruct((4, 4), "int32")}}
    assert "kinds differ" in _error(saver.restore, 1, integer, cast=True)


def test_layer_layout_gets_a_hint(saver):
    stacked = {"params": {"layers": {"w": jnp.zeros((3, 2))}, "head": jnp.zeros(2)}}
    loose = {
        "params": {f"layers_{i}": {"w": jnp.zeros(2)} for i in range(3)} | {"head": jnp.zeros(2)}
    }
    _save(saver, 1, stacked)
    assert "unstack_layers" in _error(saver.restore, 1, loose)
    _save(saver, 2, loose)
    assert "stack_layers" in _error(saver.restore, 2, stacked)
    two = {"params": {key: loose["params"][key] for key in ("layers_0", "layers_1", "head")}}
    assert "stack_layers" not in _error(saver.restore, 1, two)


def test_params_only(saver):
    items = init_state()
    _save(saver, 1, items, config="full")
    for path in (saver.directory, saver.directory / "1"):
        for wanted in (None, abstract(items["params"])):
            restored = restore_params(path, wanted)
            assert list(restored.items) == ["params"] and restored.meta == {"config": "full"}
            assert digest(restored.items["params"]) == digest(items["params"])
    _save(saver, 2, {"params": items["params"]})
    assert digest(restore_params(saver.directory).items) == digest(items["params"])
    message = _error(saver.restore, 2, abstract(items))
    assert "holds params but not opt_state, train" in message and "restore_params" in message


def test_missing_checkpoints_are_clear_errors(saver, tmp_path):
    assert saver.steps() == [] and saver.latest_good() is None
    assert "no complete checkpoint" in _error(saver.restore, None, {})
    assert "neither" in _error(restore_params, tmp_path)
    _save(saver, 4, init_state())
    assert "no complete step 5" in _error(saver.restore, 5, {})


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format_version": 1}', b"[" * 100_000])
def test_metadata_of_strangers_is_refused(saver, content):
    (saver.directory / "1" / "meta").mkdir(parents=True)
    (saver.directory / "1" / "meta" / "metadata").write_bytes(content)
    assert "is not the metadata of a checkpoint" in _error(read_meta, saver.directory / "1")


@pytest.mark.parametrize(
    "version", range(1, step_files.FORMAT_VERSION + 1), ids=lambda version: f"v{version}"
)
def test_checkpoints_of_earlier_versions_load(version):
    items = golden_items()
    checkpointer = Checkpointer(GOLDEN / f"checkpoint_v{version}")
    restored = checkpointer.restore(None, items)
    assert restored.step == 7 and restored.meta == {"config": {"model": "golden"}}
    keys = [tree["train"].pop("key") for tree in (items, restored.items)]
    assert jax.random.key_data(keys[0]).tolist() == jax.random.key_data(keys[1]).tolist()
    assert digest(restored.items) == digest(items)


def test_unknown_format_version_is_refused(saver, monkeypatch):
    monkeypatch.setattr(step_files, "FORMAT_VERSION", 99)
    _save(saver, 1, init_state())
    monkeypatch.undo()
    assert "has checkpoint format 99" in _error(saver.restore, 1, abstract(init_state()))
