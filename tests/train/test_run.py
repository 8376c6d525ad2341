# SPDX-License-Identifier: Apache-2.0
"""Whole runs: exact resume, working directory, dry run, export, other starting points."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from sqzjax import config as configs
from sqzjax.errors import CheckpointError, ConfigError, DataError
from sqzjax.io import checkpoint, hf
from sqzjax.io.tokenizer import ByteTokenizer
from sqzjax.models import DecoderLM, Execution
from sqzjax.models.sizes import SIZES
from sqzjax.sharding import MeshConfig
from tests.tolerances import CHUNKED, SHARDED
from tests.train import toy
from train.config import CheckpointConfig, EvalConfig, LoRAConfig, TrainConfig
from train.data.bpe import train_bpe
from train.model_source import Adjust, Custom, Preset, Pretrained
from train.optim import WSD, Cosine, Muon
from train.run import dry_plan, run
from train.session import Session

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def text(tmp_path):
    return toy.write_text(tmp_path)


def records(workdir):
    """Metrics of a run without what the clock decides."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    timed = ("time", "throughput/", "memory/")
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines
    ]


def params_of(workdir, step=None):
    folder = workdir / "checkpoints"
    return checkpoint.restore_params(folder / str(step) if step else folder).items["params"]


def test_interrupted_run_equals_an_undisturbed_one(text, tmp_path):
    """Stop at 10 of 20 (a checkpoint inside a logging window), continue: the same bytes and log."""
    config = toy.run_config(
        text, ema=0.9, schedule=Cosine(learning_rate=3e-3), eval=EvalConfig(interval=4, batches=2)
    )
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert run(config, workdir=whole) == 0
    assert run(config, workdir=split) == 0
    assert toy.same_bytes(params_of(whole), params_of(split))
    # Pretend the second run was killed after step 10 and before anything later was saved.
    for folder in split.glob("checkpoints/20"):
        folder.rename(tmp_path / "lost")
    assert run(config, workdir=split) == 0
    assert toy.same_bytes(params_of(whole), params_of(split))
    assert records(whole) == records(split)
    names = set().union(*records(whole))
    assert {"train/loss", "train/grad_norm", "eval/held_out/loss"} <= names
    assert [r["step"] for r in records(whole) if "train/loss" in r] == [3, 6, 9, 12, 15, 18, 20]
    seen = {r["step"]: r["data/epochs"] for r in records(whole) if "eval/held_out/loss" in r}
    assert list(seen) == [4, 8, 12, 16, 20] and seen[20] == 5 * seen[4] > 0


def test_working_directory(text, tmp_path):
    config = toy.run_config(text, steps=4)
    assert run(config, workdir=tmp_path / "run") == 0
    workdir = tmp_path / "run"
    assert configs.load(TrainConfig, workdir / "config.yaml") == config
    assert "training in" in (workdir / "train.log").read_text() or not logging.root.isEnabledFor(20)
    meta = checkpoint.read_meta(workdir / "checkpoints" / "4")
    assert meta["step"] == 4 and meta["tokens_seen"] == 4 * 4 * 16
    assert configs.load(TrainConfig, meta["config"]) == config
    metrics = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["throughput/tokens_per_second"] > 0 and metrics["memory/peak_bytes"] > 0


def test_resume_choices(text, tmp_path):
    config = toy.run_config(text, steps=6, checkpoint=CheckpointConfig(interval=2, keep=10))
    workdir = tmp_path / "run"
    assert run(config, workdir=workdir) == 0
    first = params_of(workdir, 6)
    assert run(config, workdir=workdir, resume="4") == 0
    assert toy.same_bytes(first, params_of(workdir, 6))
    assert run(config, workdir=workdir, resume="never") == 0
    assert toy.same_bytes(first, params_of(workdir, 6))
    assert [r["step"] for r in records(workdir)] == [3, 6]


def test_a_refused_command_changes_nothing(text, tmp_path):
    config = toy.run_config(text, steps=6)
    workdir = tmp_path / "run"
    assert run(config, workdir=workdir) == 0
    before = files_of(workdir)
    assert {"config.yaml", "heldout.npz", "baselines.json"} <= before.keys()
    fewer = replace(toy.MODEL, num_heads=2, num_kv_heads=1, head_dim=2 * toy.MODEL.head_dim)
    assert fewer.num_params == toy.MODEL.num_params and fewer != toy.MODEL
    data = replace(config.data, eval_fraction=0.4)
    refused = {
        "no complete step 5": ({}, "5"),
        "(?s)differs from the checkpoint's.*seed": ({"seed": 1}, "auto"),
        "(?s)differs from the checkpoint's.*held_out": ({"data": data}, "auto"),
        "does not fit": ({"optimizer": Muon()}, "auto"),
        "num_heads was 4 and is 2": ({"model": Custom(config=fewer)}, "auto"),
        "at step 6 already, past steps=4": ({"steps": 4}, "auto"),
    }
    for message, (changes, resume) in refused.items():
        with pytest.raises((CheckpointError, ConfigError, DataError), match=message):
            run(replace(config, **{"steps": 8, **changes}), workdir=workdir, resume=resume)
        assert files_of(workdir) == before, message


def test_an_adapter_goes_on_with_the_scale_that_it_was_trained_with(text, tmp_path):
    """Another alpha would change the model at once, and the training with it, without a word."""
    config = toy.run_config(text, steps=2, lora=LoRAConfig(rank=2, alpha=4.0))
    assert run(config, workdir=tmp_path) == 0
    other = replace(config, lora=LoRAConfig(rank=2, alpha=8.0), steps=3)
    with pytest.raises(ConfigError, match=r"lora\.alpha was 4\.0 and is 8\.0"):
        run(other, workdir=tmp_path)


def test_an_adapter_goes_on_with_the_weights_that_it_was_trained_beside(text, tmp_path):
    """Other weights of the same shapes would be adapted by what was learnt for the first ones."""
    folder, model = tmp_path / "model", DecoderLM(toy.MODEL, toy.UNROLLED)
    source = Pretrained(path=str(folder))
    config = toy.run_config(text, steps=2, model=source, lora=LoRAConfig(rank=2))

    def save(seed):
        hf.save(folder, toy.MODEL, toy.init_params(model, seed), overwrite=True)

    save(0)
    assert run(config, workdir=tmp_path / "run") == 0
    save(1)
    before = files_of(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model: its frozen weights are not those"):
        run(replace(config, steps=3), workdir=tmp_path / "run")
    assert files_of(tmp_path / "run") == before
    save(0)
    assert run(replace(config, steps=3), workdir=tmp_path / "run") == 0


def files_of(workdir):
    """Content of what a run leaves, its log and the caches of its data apart."""
    files = {str(file.relative_to(workdir)): file for file in workdir.rglob("*") if file.is_file()}
    kept = (name for name in files if not name.startswith(("data/", "train.log", ".lock")))
    return {name: files[name].read_bytes() for name in kept}


def test_what_is_refused_without_the_data_leaves_no_folder(text, tmp_path):
    workdir = tmp_path / "run"
    for changes in ({"seq_len": 10**6}, {"model": Preset(name="llama9")}):
        with pytest.raises(ConfigError):
            run(replace(toy.run_config(text), **changes), workdir=workdir)
        assert not workdir.exists()


def test_a_tokenizer_that_is_passed_over_is_mentioned(text, tmp_path, caplog):
    """A model's folder may hold a tokenizer that the data do not use."""
    folder = tmp_path / "model"
    params = jax.jit(DecoderLM(toy.MODEL, toy.UNROLLED).init_params)(jax.random.key(0))
    hf.save(folder, toy.MODEL, params)
    config = toy.run_config(text, model=Pretrained(path=str(folder)))
    for save, mentioned in ((ByteTokenizer().save, False), (save_words, True)):
        save(folder)
        caplog.clear()
        Session(config, tmp_path / "run")
        assert ("another tokenizer than the data's" in caplog.text) is mentioned


def test_texts_that_begin_unlike_those_of_evaluation_are_mentioned(text, tmp_path, caplog):
    config = toy.run_config(text)
    for add_bos, mentioned in ((None, False), (False, False), (True, True)):
        caplog.clear()
        changed = replace(config, data=replace(config.data, add_bos=add_bos))
        Session(changed, tmp_path / str(add_bos))
        assert ("begins texts without a bos" in caplog.text) is mentioned


def save_words(folder):
    train_bpe(["a few words of text"], 300).save(folder)


def test_dry_run_writes_nothing(text, tmp_path, capsys):
    config = toy.run_config(text)
    workdir = tmp_path / "none"
    assert run(config, workdir=workdir, dry_run=True) == 0
    shown = capsys.readouterr().out
    resolved, plan = shown.split("\n\n")
    assert configs.load(TrainConfig, yaml.safe_load(resolved)) == config
    assert f"{toy.MODEL.num_params:,}" in plan and "optimizer bytes" in plan
    assert not workdir.exists()


def test_plan_counts_bytes(text, tmp_path):
    config = toy.run_config(text, ema=0.9)
    session = Session(config, tmp_path)
    state = session.initial_state()
    sizes = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert session.plan == dry_plan(config)
    assert session.plan.num_params == toy.MODEL.num_params
    assert session.plan.parameter_bytes == sizes(state.trained)
    assert session.plan.optimizer_bytes == sizes(state.opt_state)
    assert session.plan.average_bytes == sizes(state.average)


def test_lora_on_a_pretrained_model_and_export(text, tmp_path):
    """Train a base, export it, train an adapter on it, export the merged model: all load in HF."""
    base = toy.run_config(text, steps=4, export=True)
    assert run(base, workdir=tmp_path / "base") == 0
    folder = tmp_path / "base" / "export"
    config, params = hf.load(folder, execution=toy.UNROLLED)
    assert toy.same_bytes(params, params_of(tmp_path / "base"))
    assert config.tokens.eos == (257,) and (folder / "tokenizer.json").is_file()

    tuned = replace(
        base, model=Pretrained(path=str(folder)), lora=LoRAConfig(rank=2), steps=6, log=base.log
    )
    assert run(tuned, workdir=tmp_path / "tuned") == 0
    items = checkpoint.read_meta(tmp_path / "tuned/checkpoints/6")
    assert items["step"] == 6
    assert (tmp_path / "tuned/checkpoints/6/lora").is_dir()
    assert not (tmp_path / "tuned/checkpoints/6/params").exists()
    merged = hf.load(tmp_path / "tuned" / "export", execution=toy.UNROLLED)[1]
    tokens = toy.batch()["tokens"]
    model = DecoderLM(config, toy.UNROLLED)
    session = Session(tuned, tmp_path / "tuned")
    from sqzjax.io.checkpoint import Checkpointer
    from train import lora

    state, _ = session.restore(Checkpointer(tmp_path / "tuned/checkpoints"), None)
    forward = jax.jit(lambda params, **adapted: model.forward(params, tokens, **adapted).logits)
    applied = forward(params, lora=lora.scaled(tuned.lora, state.trained))
    exported = forward(merged)
    np.testing.assert_allclose(exported, applied, atol=CHUNKED["float32"])
    assert run(tuned, workdir=tmp_path / "tuned") == 0  # nothing left to do: exports again


def test_model_sources():
    preset = Preset(name="llama_10m", vocab_size=300, adjust=Adjust(mask_token=299)).resolve()
    assert (preset.vocab_size, preset.embedding_size, preset.tokens.mask) == (300, 300, 299)
    longer = Preset(name="qwen3_0.6b", adjust=Adjust(rope_theta=5e6)).resolve()
    assert longer.rope == replace(SIZES["qwen3_0.6b"].rope, theta=5e6)
    student = Preset(name="qwen3_0.6b", adjust=Adjust(mask="block_causal", block_size=8)).resolve()
    assert (student.mask, student.block_size) == ("block_causal", 8)
    with pytest.raises(ValueError, match="did you mean 'llama_10m'"):
        Preset(name="llama10m").resolve()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "accumulation": 4}, "use 4 or 8"),
        ({"steps": 0}, "steps=0 must be >= 1"),
        ({"ema": 1.0}, "ema=1.0 must lie in"),
        ({"execution": Execution(dtype="float16")}, "cannot train"),
        ({"execution": Execution(param_dtype="bfloat16")}, "small updates would be rounded away"),
        ({"schedule": Cosine(warmup_steps=20)}, "warmup_steps=20 must be below steps=20"),
        ({"schedule": WSD(warmup_steps=17)}, "a cooldown of 4 steps and warmup_steps=17 exceed"),
        ({"rules": (("kernel", ("data", "data")),)}, "twice"),
    ],
)
def test_bad_settings(text, changes, message):
    with pytest.raises(ValueError, match=message):
        toy.run_config(text, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 128}, "seq_len=128 exceeds the model's max_positions=64"),
        ({"rules": (("no/such/path", ()),)}, "matches no parameter"),
        ({"model": Preset(name="llada_8b")}, "needs a causal model"),
        ({"model": Preset(name="stories260k", vocab_size=100)}, "smaller than the tokenizer's 260"),
    ],
)
def test_settings_that_do_not_fit_each_other(text, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(toy.run_config(text, **changes), workdir=tmp_path / "run")


@pytest.mark.parametrize("name", ["tiny", "demo", "llama_10m"])
def test_shipped_configs(name):
    config = configs.load(TrainConfig, ROOT / "configs" / "train" / f"{name}.yaml")
    assert configs.load(TrainConfig, yaml.safe_load(configs.dump(config))) == config
    assert dry_plan(config).num_params == config.resolve_model().num_params


@pytest.mark.slow
def test_resume_on_another_mesh(text, tmp_path):
    """Four steps on one device, four more on four: the state is resharded, the curve goes on."""
    config = toy.run_config(text, steps=8, checkpoint=CheckpointConfig(interval=4, keep=5))
    assert run(config, workdir=tmp_path / "one") == 0
    (tmp_path / "one" / "checkpoints" / "8").rename(tmp_path / "eight")
    wanted = checkpoint.restore_params(tmp_path / "eight").items["params"]
    mesh = MeshConfig(data=1, fsdp=2, tensor=2)
    assert run(replace(config, mesh=mesh), workdir=tmp_path / "one") == 0
    found = params_of(tmp_path / "one", 8)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=10 * SHARDED["float32"]), found, wanted
    )
