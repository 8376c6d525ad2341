# SPDX-License-Identifier: Apache-2.0
"""Plans that compile a run's own step: what is compiled, what is refused, and a compilation."""

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from sqzjax import config as configs
from sqzjax.errors import ConfigError
from sqzjax.models import Execution, ModelConfig, SpecialTokens
from sqzjax.sharding import MeshConfig
from tests import tolerances
from tests.train import toy
from train import topology_plan
from train.config import LoRAConfig, TrainConfig
from train.data import DataConfig, Text, TrajectoryData, TrajectoryDataset
from train.families import Language
from train.model_source import Custom
from train.objectives import RCD, BlockDiffusion
from train.optim import Constant
from train.plan_compile import train_program
from train.session import Session

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "train"
MODEL = ModelConfig(
    family="sdar",
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    max_positions=256,
    mask="block_causal",
    block_size=32,
    tokens=SpecialTokens(mask=1023),
)
SMALL = replace(MODEL, num_layers=1)
CONFIG = TrainConfig(
    model=Custom(config=MODEL),
    objective=RCD(reference=Custom(config=SMALL), diffusion=BlockDiffusion(complementary=True)),
    data=DataConfig(sources=(Text(paths=("not/there.txt",)),), eval_fraction=0),
    execution=Execution(dtype="bfloat16", remat="full"),
    mesh=MeshConfig(data=1, fsdp=2, tensor=2),
    batch_size=8,
    accumulation=2,
    seq_len=128,
    schedule=Constant(),
    ema=0.99,
)


@pytest.fixture(scope="module")
def libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'sqzjax[aot-tpu]'")


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2)])
def test_the_compiled_step_is_that_of_the_run(tmp_path, lora):
    """Shapes, dtypes and places of every argument are those that a session compiles for."""
    config = toy.run_config(toy.write_text(tmp_path), ema=0.9, lora=lora, accumulation=2)
    session = Session(config, tmp_path / "work")
    program = train_program(config, session.mesh)
    wanted = (session.layout.state, session.layout.frozen, session.abstract_batch())
    assert jax.tree.map(_seen, program.arguments) == jax.tree.map(_seen, wanted)
    same = [jax.make_jaxpr(step)(*wanted) for step in (program.function, session.step.train)]
    assert str(same[0]) == str(same[1])


def _seen(leaf):
    return (leaf.shape, leaf.dtype, leaf.sharding)


def test_columns_of_trajectories_need_no_recording():
    dataset = object.__new__(TrajectoryDataset)
    dataset.seq_len = CONFIG.seq_len
    settings = {"length": CONFIG.seq_len, "hidden_size": MODEL.hidden_size}
    dataset.store = SimpleNamespace(header=SimpleNamespace(settings=settings))
    config = replace(CONFIG, data=TrajectoryData(path="not/there"), objective=BlockDiffusion())
    assert Language().columns(config) == dataset.columns


@pytest.mark.slow
def test_bytes_agree_with_the_architecture(libtpu):
    """Parameters, AdamW's moments, the average and the frozen reference, split four ways."""
    planned = topology_plan.plan(CONFIG, "v5p:2x2x1")
    assert planned["status"] == "ok", planned["error"]

    def split(model):
        norms = model.hidden_size * (2 * model.num_layers + 1)
        norms += 0 if not model.qk_norm else 2 * model.head_dim * model.num_layers
        return 4 * ((model.num_params - norms) // 4 + norms)

    trained, sizes = split(MODEL), planned["bytes"]
    assert sizes["trained parameters"] == sizes["average"] == trained
    assert sizes["frozen parameters"] == split(SMALL)
    assert sizes["optimizer"] == pytest.approx(2 * trained, rel=tolerances.PLANNED_BYTES)
    memory = planned["memory"]
    assert memory["arguments"] == pytest.approx(sum(sizes.values()), rel=tolerances.PLANNED_BYTES)
    # The state is donated; gradients of a microbatch are the least that must be kept besides.
    assert memory["aliased"] >= math.fsum((2 * trained, sizes["optimizer"]))
    assert memory["temporaries"] >= trained
    assert planned["fits"] and planned["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}


def test_the_command_prints_the_plan(monkeypatch, capsys):
    memory = {"arguments": 40 * 10**9, "outputs": 30 * 10**9, "aliased": 29 * 10**9}
    memory |= {"temporaries": 9 * 10**9, "peak": 50 * 10**9, "code": 10**9}
    laid = {"devices": 4, "mesh": {"data": 1, "fsdp": 2, "tensor": 2}, "memory": memory}
    times = {"lower_seconds": 2.0, "compile_seconds": 40.0}
    answer = {"status": "ok", "bytes": {"optimizer": 2 * 10**10, "average": 0}, **laid, **times}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(topology_plan, "compile_in_child", lambda *request: answer)
    assert topology_plan.run(CONFIG, topology="v5p:2x2x1") == 0
    shown = capsys.readouterr().out
    assert "kind: rcd" in shown and "4 x TPU v5p" in shown and "average " not in shown
    for line in (
        "mesh                data=1 fsdp=2 tensor=2",
        "optimizer           20.00 GB",
        "new outputs         1.00 GB",
        "total               51.00 GB",
        "fits                yes: 50 %",
        "compiled in         42 s",
    ):
        assert line in shown
    memory["peak"] *= 3
    topology_plan.run(CONFIG, topology="v5p:2x2x1")
    assert "fits                no: 148 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "topology", "message"),
    [
        ({}, "v9:2x2", "topology='v9:2x2'"),
        ({"seq_len": 512}, "v5p:2x2x1", "max_positions=256"),
    ],
)
def test_what_cannot_run_is_refused_before_a_compiler_starts(
    monkeypatch, changes, topology, message
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(topology_plan, "compile_in_child", None)
    with pytest.raises(ConfigError, match=message):
        topology_plan.plan(replace(CONFIG, **changes), topology)


def test_missing_compiler_names_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--topology .* pip install 'sqzjax\[aot-tpu\]'"):
        topology_plan.plan(CONFIG, "v5p:2x2x1")


def test_outcomes_other_than_success(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    laid = {"devices": 4, "mesh": {"fsdp": 4}, "bytes": {"batch": 2_000_000}}
    told = {"status": "bad config", "error": "batch_size=8 must be a multiple of 16"}
    large = {"status": "too large", "error": "Used 99G of 95G hbm.\nmore\nmuch more", **laid}
    failed = {"status": "failed", "error": "exit code 9: killed"}
    answers = iter([told, large, failed])
    monkeypatch.setattr(topology_plan, "compile_in_child", lambda *request: next(answers))
    with pytest.raises(ConfigError, match="multiple of 16"):
        topology_plan.run(CONFIG, topology="v5p:2x2x1")
    assert topology_plan.run(CONFIG, topology="v5p:2x2x1") == 0
    assert "no: Used 99G of 95G hbm. more\n" in capsys.readouterr().out
    assert topology_plan.run(CONFIG, topology="v5p:2x2x1") == 1
    assert "could not be compiled for v5p:2x2x1: exit code 9" in capsys.readouterr().out


def test_a_batch_that_does_not_split_is_a_config_error(libtpu):
    with pytest.raises(ConfigError, match="batch_size=8 must be a multiple of 16"):
        topology_plan.plan(replace(CONFIG, mesh=MeshConfig(fsdp=4), accumulation=4), "v5p:2x2x1")


def test_the_conversion_of_an_autoregressive_model():
    """The published settings, and a model that differs from the checkpoint's in the mask alone."""
    config = configs.load(TrainConfig, CONFIGS / "block_qwen2.5_1.5b.yaml")
    model = config.resolve_model()
    assert (model.mask, model.block_size, model.shift_logits) == ("block_causal", 32, True)
    assert model.family == "qwen2" and model.tokens.mask == 151665 < model.vocab_size
    assert config.objective == BlockDiffusion(complementary=True)
    assert (config.batch_size, config.steps) == (256, 6000)
