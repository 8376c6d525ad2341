# SPDX-License-Identifier: Apache-2.0
"""What a run must survive: non-finite numbers, empty batches, a full device, a signal, no disk."""

import json
import os
import shutil
import signal
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sqzjax.errors import CheckpointError, ConfigError
from sqzjax.io.checkpoint import Checkpointer
from sqzjax.io.lock import WorkdirLock
from tests.train import toy
from train.calibrate_config import CalibrateConfig
from train.collect_config import CollectConfig
from train.ema import Average
from train.model_source import Custom
from train.objectives import LanguageModeling, LossOutput
from train.run import dry_plan, out_of_memory, run
from train.session import Session


@jax.custom_vjp
def _poison_gradient(x, broken):
    return x


def _poison(broken, gradient):
    return gradient.at[0].set(jnp.where(broken, jnp.inf, gradient[0])), None


_poison_gradient.defvjp(lambda x, broken: (x, broken), _poison)


@dataclass(frozen=True, kw_only=True)
class Faulty(LanguageModeling):
    """Break one place of the loss for batches that contain token `trigger`."""

    where: Literal["nowhere", "embeds", "loss", "gradient"] = "nowhere"
    trigger: int = 259

    def loss(
        self, model: Any, params: Any, batch: Any, key: Any, *, train: bool, lora: Any = None
    ) -> LossOutput:
        broken = (batch["tokens"] == self.trigger).any() & train
        if self.where == "embeds":
            scale = params["embed"]["embedding"]
            params = {**params, "embed": {"embedding": jnp.where(broken, jnp.nan, scale)}}
        if self.where == "gradient":
            norm = params["final_norm"]["scale"]
            params = {**params, "final_norm": {"scale": _poison_gradient(norm, broken)}}
        out = super().loss(model, params, batch, key, train=train, lora=lora)
        total = jnp.where(broken, jnp.inf, out.sum) if self.where == "loss" else out.sum
        return out._replace(sum=total)


def test_a_model_that_no_export_can_express_is_refused_before_training(tmp_path):
    config = toy.run_config(tmp_path / "absent", export=True)
    dry_plan(config)
    odd = replace(config, model=Custom(config=replace(toy.MODEL, qkv_bias=True)))
    with pytest.raises(ConfigError, match=r"cannot express out_bias=.*or set export: false"):
        dry_plan(odd)
    dry_plan(replace(odd, export=False))


@pytest.mark.parametrize("seed", [-1, 1 << 32, 1 << 70])
def test_seeds_that_would_give_the_keys_of_another_are_refused(tmp_path, seed):
    """2^32 would start from the parameters of seed 0; 2^70 was a traceback from jax."""
    with pytest.raises(ValueError, match=r"must lie in \[0, 4294967296\)"):
        toy.run_config(tmp_path, seed=seed)
    for config in (CollectConfig, CalibrateConfig):
        with pytest.raises(ValueError, match=f"seed={seed}"):
            config(model=Custom(config=toy.MODEL), seed=seed)


def content(state):
    return (state.trained, state.opt_state, state.average)


@pytest.mark.parametrize(("where", "count"), [("embeds", 1), ("loss", 2), ("gradient", 1)])
def test_non_finite_step_changes_nothing(where, count):
    """Reliability case 15: state unchanged to the byte, the counter up, the next step accepted."""
    step = toy.make_step(objective=Faulty(where=where), average=Average(0.9), accumulation=count)
    train = jax.jit(step.train)
    state, _ = train(toy.start(step), None, toy.batch(0))
    bad = toy.batch(1)
    bad["tokens"] = bad["tokens"].at[0, 0].set(259)
    after, metrics = train(state, None, bad)
    assert toy.same_bytes(content(after), content(state))
    assert (int(after.rejected), int(after.rejected_in_row), int(after.step)) == (1, 1, 2)
    assert not np.isfinite(metrics["grad_norm"]) or not np.isfinite(metrics["loss"][0])
    good, _ = train(after, None, toy.batch(2))
    assert (int(good.rejected), int(good.rejected_in_row)) == (1, 0)
    assert not toy.same_bytes(good.trained, after.trained)


def test_non_finite_parameter_is_never_updated():
    step = toy.make_step()
    state = toy.start(step)
    state.trained["head"]["kernel"] = state.trained["head"]["kernel"].at[0, 0].set(jnp.nan)
    after, _ = jax.jit(step.train)(state, None, toy.batch())
    assert int(after.rejected) == 1 and toy.same_bytes(content(after), content(state))


def test_an_update_that_overflows_changes_nothing():
    """Loss and gradients are finite, the parameters after the step would not be."""
    plain = toy.make_step(average=Average(0.9))
    step = replace(plain, rate=lambda step: jnp.float32(3e38) * jnp.where(step == 1, 2, 0))
    train = jax.jit(step.train)
    state, _ = train(toy.start(step), None, toy.batch(0))
    after, metrics = train(state, None, toy.batch(1))
    assert np.isfinite(metrics["loss"][0]) and np.isfinite(metrics["grad_norm"])
    assert int(after.rejected) == 1 and toy.same_bytes(content(after), content(state))


def test_batches_without_targets_change_nothing():
    """Reliability case 16."""
    step = toy.make_step(average=Average(0.5))
    train = jax.jit(step.train)
    state, _ = train(toy.start(step), None, toy.batch())
    for empty in ("no target", "padding", "one token"):
        batch = toy.batch(1)
        if empty == "no target":
            batch["loss_mask"] = jnp.zeros_like(batch["loss_mask"])
        else:
            alone = (jnp.arange(12) > 0) if empty == "one token" else jnp.ones(12, bool)
            for name in ("positions", "segment_ids"):
                batch[name] = jnp.where(alone, -1, 0) + jnp.zeros_like(batch[name])
        after, metrics = train(state, None, batch)
        assert metrics["loss"] == (0.0, 0.0) and metrics["grad_norm"] == 0.0, empty
        assert toy.same_bytes(content(after), content(state)), empty
        assert (int(after.rejected), int(after.step)) == (0, 2)


def poisoned(config, monkeypatch, first):
    """Let every batch from step `first` on (counted from 0) contain the trigger."""
    original = Session.__init__

    def init(self, *args):
        original(self, *args)
        make = self.dataset.batch

        def batch(step):
            found = make(step)
            if step >= first:
                found["tokens"][0, 0] = 259
            return found

        self.dataset.batch = batch

    monkeypatch.setattr(Session, "__init__", init)
    return replace(config, objective=Faulty(where="gradient"))


def test_run_stops_after_five_bad_steps(tmp_path, monkeypatch):
    """Exit code 3; the last good state is the newest checkpoint; the batches are on record."""
    text = toy.write_text(tmp_path)
    good = replace(toy.run_config(text), steps=7)
    assert run(replace(good, objective=Faulty()), workdir=tmp_path / "good") == 0
    bad = poisoned(replace(good, steps=20), monkeypatch, first=7)
    workdir = tmp_path / "bad"
    assert run(bad, workdir=workdir) == 3
    records = [
        json.loads(line) for line in (workdir / "bad_batches.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records][:5] == [8, 9, 10, 11, 12]
    assert records[0]["rows"] == [28, 32] and records[0]["grad_norm"] in ("inf", "nan")
    steps = Checkpointer(workdir / "checkpoints").steps()
    newest = workdir / "checkpoints" / str(steps[-1])
    from sqzjax.io.checkpoint import restore_params

    wanted = restore_params(tmp_path / "good" / "checkpoints" / "7").items["params"]
    assert toy.same_bytes(restore_params(newest).items["params"], wanted)
    monkeypatch.undo()
    assert run(bad, workdir=workdir) == 0  # with repaired data the run goes on


def test_few_bad_steps_are_survived(tmp_path, monkeypatch):
    text = toy.write_text(tmp_path)
    config = poisoned(toy.run_config(text), monkeypatch, first=17)
    assert run(config, workdir=tmp_path / "run") == 0
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["train/rejected_steps"] == 3.0


def test_preempted_run_continues(tmp_path, monkeypatch):
    """Reliability case 3: SIGTERM saves the current step, exits 75, and costs nothing."""
    text = toy.write_text(tmp_path)
    config = toy.run_config(text)
    assert run(config, workdir=tmp_path / "whole") == 0
    original = Session.put
    calls = []

    def put(self, batch):
        calls.append(batch)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(Session, "put", put)
    workdir = tmp_path / "cut"
    assert run(config, workdir=workdir) == 75
    steps = Checkpointer(workdir / "checkpoints").steps()
    assert steps and steps[-1] in (7, 8)
    monkeypatch.undo()
    assert run(config, workdir=workdir) == 0
    from sqzjax.io.checkpoint import restore_params

    left, right = (
        restore_params(tmp_path / name / "checkpoints").items["params"] for name in ("whole", "cut")
    )
    assert toy.same_bytes(left, right)


def test_out_of_memory_names_what_to_lower(tmp_path):
    """Reliability case 17, with a real allocation failure."""
    config = toy.run_config(toy.write_text(tmp_path))
    plan = Session(config, tmp_path).plan
    with pytest.raises(ConfigError) as caught, out_of_memory(plan):
        jax.block_until_ready(jax.jit(lambda: jnp.ones((1 << 20, 1 << 26)) * 2.0)())
    message = str(caught.value)
    for word in ("parameters", "optimizer", "activations", "remat", "batch_size", "fsdp", "lora"):
        assert word in message
    with pytest.raises(jax.errors.JaxRuntimeError), out_of_memory(plan):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_failed_save_does_not_stop_training(tmp_path, monkeypatch):
    """Reliability case 6: the run goes on, the next save succeeds."""
    from sqzjax.io import step_files

    text = toy.write_text(tmp_path)
    original, tries = step_files.write_step, []

    def write_step(folder, step, *rest):
        tries.append(step)
        if step == 10:
            raise OSError(28, "No space left on device")
        return original(folder, step, *rest)

    monkeypatch.setattr(step_files, "write_step", write_step)
    assert run(toy.run_config(text), workdir=tmp_path / "run") == 0
    assert tries == [10, 20]
    assert Checkpointer(tmp_path / "run" / "checkpoints").steps() == [20]


def test_lost_last_save_is_an_error(tmp_path, monkeypatch):
    from sqzjax.io import step_files

    def write_step(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(step_files, "write_step", write_step)
    with pytest.raises(CheckpointError, match="last checkpoint could not be written"):
        run(toy.run_config(toy.write_text(tmp_path), steps=2), workdir=tmp_path / "run")


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch, caplog):
    """Without asking orbax, whose threads print hundreds when a write fails."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100))
    with pytest.raises(CheckpointError, match=r"bytes are needed and 100 are free.*free the disk"):
        run(toy.run_config(toy.write_text(tmp_path), steps=2), workdir=tmp_path / "run")
    assert "ERROR" not in caplog.text and not list((tmp_path / "run/checkpoints").iterdir())


def test_second_run_in_one_folder_is_refused(tmp_path):
    config = toy.run_config(toy.write_text(tmp_path))
    with WorkdirLock(tmp_path / "run"), pytest.raises(CheckpointError, match="in use by process"):
        run(config, workdir=tmp_path / "run")
