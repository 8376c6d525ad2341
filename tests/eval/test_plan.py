# SPDX-License-Identifier: Apache-2.0
"""Capacity plans: what is refused, the arithmetic, and programs compiled for TPUs."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from eval import plan, plan_report
from eval.plan_config import DecodeProgram, PlanConfig, TrainProgram
from eval.speed_config import SpeedModel
from sqzjax.analysis import DEVICES, Hardware
from sqzjax.analysis.jaxpr import count_flops
from sqzjax.analysis.topology import CHIPS, compile_environment
from sqzjax.config import load, to_dict
from sqzjax.errors import ConfigError
from sqzjax.kvcache import Dense
from sqzjax.models import DecoderLM, Execution
from sqzjax.models.config import ModelConfig
from sqzjax.models.sizes import SIZES
from sqzjax.sharding_config import MeshConfig
from tests import tolerances

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "eval").glob("plan_*.yaml"))
TINY = ModelConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=128,
    max_positions=256,
)
BLOCKS = dataclasses.replace(TINY, family="sdar", mask="block_causal", block_size=4)
MESH = MeshConfig(data=2, fsdp=2, tensor=2)
CONFIG = PlanConfig(
    models=(SpeedModel(name="tiny", architecture=TINY),),
    topology="v5p:2x2x2",
    train=TrainProgram(mesh=MESH, batch_size=8, seq_len=128),
    decode=DecodeProgram(mesh=MESH, batch_size=32, context=256),
    timeout_s=300,
)
LINK = Hardware(name="x", bandwidth=1.0, peak_flops=1.0, link_bandwidth=10.0)


@pytest.fixture(scope="session")
def libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'sqzjax[aot-tpu]'")


@pytest.fixture(scope="module")
def planned(libtpu, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    record = plan.run_plan(CONFIG, folder)
    assert json.loads((folder / "plan.json").read_text()) == json.loads(json.dumps(record))
    assert (folder / "plan.md").read_text() == plan_report.markdown(record)
    return {row["phase"]: row for row in record["programs"]}


@pytest.mark.slow
def test_bytes_agree_with_xla(planned):
    """Parameters, AdamW's two moments and the cache, counted from the architecture alone."""
    ways = 4  # fsdp x tensor; norms are whole on every chip
    norms = TINY.hidden_size * (2 * TINY.num_layers + 1)
    split = (TINY.num_params - norms) // ways + norms
    cache = 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 32 * 256 * 2 // 8
    expected = {"train": 3 * 4 * split, "decode": 2 * split + cache}
    for phase, row in planned.items():
        assert row["status"] == "ok", row["error"]
        assert row["memory"]["arguments"] == pytest.approx(
            expected[phase], rel=tolerances.PLANNED_BYTES
        )
        assert row["arguments"] == pytest.approx(
            row["memory"]["arguments"], rel=tolerances.PLANNED_BYTES
        )
    assert planned["train"]["bytes"]["parameters"] == 4 * split
    assert planned["decode"]["bytes"]["cache"] == pytest.approx(cache, rel=tolerances.PLANNED_BYTES)


@pytest.mark.parametrize("architecture", [TINY, BLOCKS], ids=["causal", "blocks"])
@pytest.mark.slow
def test_decoding_on_axes_of_size_one(libtpu, tmp_path, architecture):
    """No axis may be left to the partitioner, which refuses kernels; the cache is not gathered."""
    queries = max(1, architecture.block_size)
    mesh = MeshConfig(data=4, tensor=2)
    decode = dataclasses.replace(CONFIG.decode, mesh=mesh, queries=queries)
    models = (SpeedModel(name="tiny", architecture=architecture),)
    asked = dataclasses.replace(CONFIG, models=models, train=None, decode=decode)
    record = plan.run_plan(asked, tmp_path)
    (row,) = record["programs"]
    assert row["status"] == "ok", row["error"]
    limits = row["roofline"]
    assert limits["sent"] < row["bytes"]["cache"]
    assert limits["tokens_per_second"] == 32 * queries / limits["overlapped"]


@pytest.mark.parametrize("queries", [1, 4, 32])
def test_operations_of_a_block_are_those_of_the_program(queries):
    """Counted in the traced step of one device, with a full cache."""
    settings = DecodeProgram(batch_size=8, context=256, queries=queries, mesh=MeshConfig(data=1))
    model = DecoderLM(BLOCKS, Execution(scan_layers=False))
    caches = jax.eval_shape(
        lambda: model.init_caches(Dense(), batch=8, capacity=256, max_new=queries)
    )
    tokens = jax.ShapeDtypeStruct((8, queries), jnp.int32)
    counted = count_flops(
        lambda params, caches, tokens: model.forward(
            params,
            tokens,
            positions=caches.length[:, None] + jnp.arange(queries),
            caches=caches,
        ),
        model.abstract_params(),
        caches,
        tokens,
    )
    row = {"mesh": {"data": 1, "fsdp": 1, "tensor": 1}}
    flops, traffic = plan._decode_costs(BLOCKS, settings, row)
    assert counted == pytest.approx(flops, rel=tolerances.FLOPS_REL)
    one = dataclasses.replace(settings, queries=1)
    single = plan._decode_costs(BLOCKS, one, row)
    assert flops == pytest.approx(queries * single[0], rel=tolerances.FLOPS_REL)
    # Weights and cache are read once, whatever the block; what grows are activations.
    assert single[1] <= traffic < max(2, queries / 4) * single[1]


def test_donated_state_needs_no_second_copy(planned):
    for row in planned.values():
        memory = row["memory"]
        assert (
            row["fits"]
            and memory["peak"] < memory["arguments"] + memory["outputs"] + (memory["temporaries"])
        )


def test_communication_and_time(planned):
    for row in planned.values():
        assert row["devices"] == 8 and not row["unknown_loops"]
        assert {"all-reduce", "all-gather"} <= {step["kind"] for step in row["collectives"]}
        assert all(1 <= step["axes"] <= 3 for step in row["collectives"])
        limits = row["roofline"]
        times = [limits[name] for name in ("compute", "memory", "link")]
        assert min(times) > 0 and limits["overlapped"] == max(times)
    # Decoding sends activations and, with fsdp, weights; the cache stays where it is.
    sizes = planned["decode"]["bytes"]
    assert planned["decode"]["roofline"]["sent"] < sizes["parameters"] + sizes["cache"]
    train = planned["train"]["roofline"]
    assert train["flops"] / train["model_flops"] == pytest.approx(4 / 3, rel=tolerances.FLOPS_REL)
    assert train["tokens_per_second"] == 8 * 128 / train["overlapped"]


def test_report_shows_every_table(planned):
    record = {
        "config": to_dict(CONFIG),
        "hardware": vars(CONFIG.hardware),
        "versions": {"jax": "1", "libtpu": "2"},
        "commit": "c",
        "created": "d",
        "programs": [
            *planned.values(),
            {"model": "big", "phase": "train", "status": "too large", "error": "Used 2G of 1G\nx"},
        ],
    }
    text = plan_report.markdown(record)
    assert "| tiny | train | data=2 fsdp=2 tensor=2 |" in text
    assert "Communication of tiny, decode" in text and "**big train: too large.** Used 2G" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": TrainProgram(mesh=MESH, batch_size=9)}, "batch_size=9"),
        ({"topology": "v5e:3x4"}, "topology='v5e:3x4'"),
        ({"train": TrainProgram(mesh=MeshConfig(data=1, tensor=16))}, "tensor=16"),
    ],
)
def test_what_does_not_fit_the_chips_is_a_config_error(libtpu, tmp_path, change, message):
    fields = {"models": CONFIG.models, "topology": CONFIG.topology, "train": CONFIG.train} | change
    with pytest.raises(ConfigError, match=message):
        plan.run_plan(PlanConfig(**fields, decode=None), tmp_path)


def test_missing_compiler_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sqzjax\[aot-tpu\]'"):
        plan.run_plan(CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_child_that_dies_or_hangs_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    result = plan._compile({}, CONFIG)
    assert result["status"] == "failed" and "exit code 1" in result["error"]
    monkeypatch.setattr(plan, "_compile", lambda request, config: result)
    row = plan._plan(CONFIG, 0, CONFIG.models[0], "train")
    assert row["status"] == "failed" and "roofline" not in row


def test_child_environment_is_compile_only():
    inherited = {"TPU_NAME": "mine", "PATH": "p", "JAX_PLATFORMS": "cuda"}
    kept = compile_environment(inherited, Path(plan.__file__).parents[1])
    assert kept["PATH"] == "p" and kept["JAX_PLATFORMS"] == "cpu" and "TPU_NAME" not in kept
    assert Path(kept["PYTHONPATH"], "eval", "plan.py").is_file()


def test_link_time():
    steps = [
        {"count": 3, "sent_bytes": 40.0, "axes": 2},
        {"count": 1, "sent_bytes": 20.0, "axes": 1},
    ]
    assert plan.link_seconds(steps, LINK) == 3 * 40 / (2 * 2 * 10) + 20 / (2 * 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topology": "v9:2x2"}, "topology='v9:2x2'"),
        ({"topology": "v5p:8x8x8"}, "512 chips"),
        ({"models": ()}, "at least one model"),
        ({"train": None, "decode": None}, "both null"),
        ({"timeout_s": 0}, "timeout_s=0"),
    ],
)
def test_bad_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(**({"models": CONFIG.models} | change))


@pytest.mark.parametrize(("queries", "message"), [(0, "queries=0"), (65, "at most context=64")])
def test_blocks_must_lie_in_the_context(queries, message):
    with pytest.raises(ValueError, match=message):
        DecodeProgram(context=64, queries=queries)


def test_every_chip_has_a_record_with_links_and_memory():
    for name in CHIPS.values():
        assert DEVICES[name].link_bandwidth and DEVICES[name].memory_bytes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_name_known_models_and_meshes_that_fit(path):
    config = load(PlanConfig, path)
    for entry in config.models:
        assert config.decode and config.decode.context <= SIZES[entry.name].max_positions
    for program in filter(None, (config.train, config.decode)):
        data, fsdp, tensor = program.mesh.sizes(config.num_chips)
        assert data * fsdp * tensor == config.num_chips
        assert program.batch_size % (data * fsdp) == 0


@pytest.mark.slow
def test_8b_on_64_chips(libtpu, tmp_path):
    """The shipped plan: five minutes at most, and bytes as XLA counts them."""
    config = load(PlanConfig, next(path for path in CONFIGS if path.stem == "plan_llama3_8b"))
    record = plan.run_plan(config, tmp_path)
    assert sum(row["seconds"] for row in record["programs"]) < 300
    for row in record["programs"]:
        assert row["status"] == "ok" and row["fits"], row["error"]
        assert row["arguments"] == pytest.approx(
            row["memory"]["arguments"], rel=tolerances.PLANNED_BYTES
        )
