# SPDX-License-Identifier: Apache-2.0
"""Loading models under evaluation: exported folders and checkpoints of training runs."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from eval import curves, models
from eval.config import ModelEntry
from sqzjax import config as configs
from sqzjax.decode import SamplingConfig
from sqzjax.decode.commit import Threshold
from sqzjax.errors import CheckpointError, ConfigError, DataError
from sqzjax.io import hf
from sqzjax.io import tokenizer as tokenizers
from sqzjax.io.checkpoint import Checkpointer
from sqzjax.models import DecoderLM, Execution
from tests.eval.conftest import TINY

BYTES = tokenizers.load("bytes")


def params_of(seed: int, config=TINY):
    """Make stacked parameters that differ by seed; quicker than an initialisation."""
    rng = np.random.default_rng(seed)
    shapes = DecoderLM(config, Execution()).abstract_params()
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def meta(**config) -> dict:
    return {
        "model": configs.to_dict(TINY),
        "config": {"ema": None, "lora": None, "data": {"tokenizer": {"kind": "bytes"}}, **config},
        "data": {"fingerprint": {"tokenizer": BYTES.fingerprint}},
    }


def save(workdir, step, items, **config) -> None:
    with Checkpointer(workdir / "checkpoints", keep=None, async_save=False) as checkpoints:
        checkpoints.save(step, items, meta(**config))


def embedding(model: models.LoadedModel) -> np.ndarray:
    return np.asarray(model.params["embed"]["embedding"])


def test_newest_good_checkpoint_is_loaded(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, {"params": params_of(step)})
    found = models.load(ModelEntry(path=str(tmp_path)))
    np.testing.assert_array_equal(embedding(found), params_of(2)["embed"]["embedding"])
    assert found.describe()["source"] == f"checkpoint at step 2 of {tmp_path}"
    assert not found.model.execution.scan_layers and "layers_0" in found.params
    first = models.load(ModelEntry(path=str(tmp_path), step=1))
    np.testing.assert_array_equal(embedding(first), params_of(1)["embed"]["embedding"])
    assert first.fingerprint != found.fingerprint
    files = [path for path in (tmp_path / "checkpoints/2").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    fallen = models.load(ModelEntry(path=str(tmp_path)))
    np.testing.assert_array_equal(embedding(fallen), params_of(1)["embed"]["embedding"])


def test_checkpoint_and_export_of_the_same_weights_agree(tmp_path):
    save(tmp_path, 5, {"params": params_of(5)})
    BYTES.save(tmp_path / "files")
    files = sorted((tmp_path / "files").iterdir())
    hf.save(tmp_path / "export", TINY, params_of(5), tokenizer_files=files)
    loaded = [
        models.load(ModelEntry(path=str(tmp_path), weights=kind))
        for kind in ("auto", "checkpoint", "export")
    ]
    assert [m.found.is_checkpoint for m in loaded] == [True, True, False]
    tokens = np.arange(20)[None]
    one, two, three = (jax.jit(m.model.forward)(m.params, tokens).logits for m in loaded)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)


def test_the_average_of_a_run_is_what_is_evaluated(tmp_path):
    train = {"step": np.int32(1), "average": params_of(8)}
    save(tmp_path, 1, {"params": params_of(7), "train": train}, ema=0.99)
    found = models.load(ModelEntry(path=str(tmp_path)))
    np.testing.assert_array_equal(embedding(found), params_of(8)["embed"]["embedding"])


def test_an_adapter_alone_is_not_enough(tmp_path):
    save(tmp_path, 1, {"lora": {"a": np.zeros(3, np.float32)}}, lora={"rank": 2})
    with pytest.raises(CheckpointError, match=r"no weights at"):
        models.find(ModelEntry(path=str(tmp_path)))
    with pytest.raises(CheckpointError, match=r"LoRA adapter alone.*weights: export"):
        models.find(ModelEntry(path=str(tmp_path), weights="checkpoint"))
    hf.save(tmp_path / "export", TINY, params_of(1))
    assert models.find(ModelEntry(path=str(tmp_path))).folder == tmp_path / "export"


def test_wrong_places_are_named(tmp_path, tiny_folder):
    with pytest.raises(CheckpointError, match="'absent': no weights at"):
        models.find(ModelEntry(path=str(tmp_path / "absent")))
    save(tmp_path, 1, {"params": params_of(1)})
    with pytest.raises(CheckpointError, match=r"holds no step 9; it has \[1\]"):
        models.find(ModelEntry(path=str(tmp_path), step=9))
    shutil.copytree(tiny_folder, tmp_path / "folder")
    (tmp_path / "folder" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        models.load(ModelEntry(path=str(tmp_path / "folder")))
    assert models.load(ModelEntry(path=str(tmp_path / "folder"), tokenizer="bytes"))


def test_another_tokenizer_than_the_training_runs_is_not_taken(tmp_path):
    description = meta()
    description["data"]["fingerprint"]["tokenizer"] = "something else"
    with Checkpointer(tmp_path / "checkpoints", async_save=False) as checkpoints:
        checkpoints.save(1, {"params": params_of(1)}, description)
    with pytest.raises(CheckpointError, match="key tokenizer"):
        models.find(ModelEntry(path=str(tmp_path)))
    assert models.find(ModelEntry(path=str(tmp_path), tokenizer="bytes")).tokenizer == "bytes"


def test_weights_that_do_not_fit_their_description_are_refused(tmp_path):
    broken = params_of(1)
    broken["final_norm"] = {"scale": np.zeros(5, np.float32)}
    save(tmp_path, 1, {"params": broken})
    with pytest.raises(CheckpointError, match=r"final_norm.*\(5,\), expected \(16,\)"):
        models.load(ModelEntry(path=str(tmp_path)))


def test_decoder_settings_are_checked():
    rule = {"kind": "threshold", "threshold": 0.8}
    entry = ModelEntry(path="x", decoder={"kind": "diffusion", "commit": rule})
    config = models.decoder_config(entry)
    assert config is not None and config.commit == Threshold(threshold=0.8)
    assert models.decoder_config(ModelEntry(path="x")) is None
    for wrong, problem in (({"steps": 3}, "steps"), ({"reuse": {"kind": "paged"}}, "reuse")):
        with pytest.raises(ConfigError, match=f"decoder of model 'x'.*{problem}"):
            models.decoder_config(ModelEntry(path="x", decoder={"kind": "diffusion", **wrong}))
    with pytest.raises(ValueError, match="needs kind: diffusion"):
        ModelEntry(path="x", decoder={"kind": "beam"})


def test_cache_settings_are_checked():
    assert models.cache_policy(ModelEntry(path="x", cache={"kind": "dense"})) is not None
    with pytest.raises(ConfigError, match=r"cache of model 'x'.*bits"):
        models.cache_policy(ModelEntry(path="x", cache={"kind": "dense", "bits": 3}))
    with pytest.raises(ConfigError, match="cache of model 'x'"):
        models.cache_policy(ModelEntry(path="x", cache={"kind": "absent"}))
    with pytest.raises(ValueError, match="needs a kind"):
        ModelEntry(path="x", cache={"bits": 3})


def test_generation_does_not_depend_on_the_batch(tiny):
    from sqzjax.decode import SamplingConfig

    prompts = [[256, *range(97, 97 + n)] for n in (3, 9, 1, 20, 5, 6)]
    sampling = SamplingConfig(max_new_tokens=6, temperature=1.0, seed=4)
    together = tiny.generate(prompts, sampling, row_ids=range(6))
    alone = [tiny.generate([p], sampling, row_ids=[i])[0] for i, p in enumerate(prompts)]
    assert together == alone


# What a run leaves besides its weights ------------------------------------------------------------


def write_metrics(folder, rows) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_curves_are_read_and_a_torn_end_is_dropped(tmp_path):
    rows = [
        {"step": s, "train/loss": 5.0 - s, "throughput/tokens_per_second": 10 * s}
        for s in (1, 2, 3)
    ]
    rows += [{"step": 2, "eval/held_out/loss": 3.5}, {"step": 3, "eval/held_out/loss": None}]
    write_metrics(tmp_path, rows)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tra')
    curve = curves.training_curve(tmp_path)
    assert curve["series"]["train/loss"] == [(1, 4.0), (2, 3.0), (3, 2.0)]
    assert curve["series"]["eval/held_out/loss"] == [(2, 3.5)]
    assert (curve["steps"], curve["tokens_per_second"]) == (3, 20.0)
    assert curve["best"] == {"eval/held_out/loss": 3.5}
    assert curve["baselines"] == {}


def test_long_curves_are_thinned_by_averaging():
    points = [(i, float(i)) for i in range(10_000)]
    thin = curves.thin(points)
    assert len(thin) <= curves.MAX_POINTS and thin[-1][0] == 9999
    assert np.mean([v for _, v in thin]) == pytest.approx(np.mean([v for _, v in points]), rel=0.01)


def test_bad_run_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*metrics\.jsonl"):
        curves.training_curve(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 1: not valid JSON"):
        curves.training_curve(tmp_path)
    write_metrics(tmp_path, [{"step": 1, "train/loss": None}])
    with pytest.raises(DataError, match="no finite train/loss"):
        curves.training_curve(tmp_path)
    (tmp_path / "baselines.json").write_text('{"unigram": {"perplexity": 3}}')
    with pytest.raises(DataError, match=r"baselines\.json"):
        curves.baselines(tmp_path)


def test_baselines_are_read(tmp_path):
    (tmp_path / "baselines.json").write_text('{"unigram": {"nll": 1.0}, "note": "x"}')
    assert curves.baselines(tmp_path)["unigram"]["perplexity"] == pytest.approx(np.e)


def test_a_decoder_that_does_not_suit_the_model_is_named(tmp_path):
    tokens = replace(TINY.tokens, mask=0)
    config = replace(TINY, family="llada", mask="bidirectional", tokens=tokens)
    found = models.Found(config, tmp_path, False, None, "bytes")
    entry = ModelEntry(path="x", decoder={"kind": "diffusion", "reuse": {"kind": "exact"}})
    with pytest.raises(ConfigError, match=r"decoder of model 'x': reuse.kind='exact' needs"):
        models.check_decoder(entry, found)
    models.check_decoder(ModelEntry(path="x", decoder={"kind": "diffusion"}), found)


def diffusion_run(workdir, seed, **changes):
    """Write an exported masked diffusion model."""
    tokens = replace(TINY.tokens, mask=0)
    config = replace(TINY, family="llada", mask="bidirectional", tokens=tokens, **changes)
    BYTES.save(workdir / "files")
    files = sorted((workdir / "files").iterdir())
    hf.save(workdir / "export", config, params_of(seed, config), tokenizer_files=files)
    return str(workdir)


def test_a_reference_model_opens_the_blocks(tmp_path):
    """A model as its own reference sees in the first step what an extra pass would show."""
    path, other = (diffusion_run(tmp_path / name, seed) for seed, name in enumerate("ab"))
    sampling = SamplingConfig(max_new_tokens=8, temperature=0.0)
    found = {}
    for init, reference in (("self", ""), ("reference", path), ("reference", other)):
        context = {"kind": "residual", "init_from": init}
        decoder = {"kind": "diffusion", "block_size": 8, "context": context}
        model = models.load(ModelEntry(path=path, decoder=decoder, reference=reference))
        # Most bytes that random models say are no text.
        tokens = model._generator.generate([[1, 2, 3], [4]], sampling).tokens
        found[init, reference] = (tokens.tolist(), model.fingerprint)
    assert found["self", ""][0] == found["reference", path][0] != found["reference", other][0]
    assert len({fingerprint for _, fingerprint in found.values()}) == 3


def test_a_reference_model_that_does_not_suit_is_named(tmp_path):
    path, small = (
        diffusion_run(tmp_path / "a", 0),
        diffusion_run(tmp_path / "b", 0, vocab_size=300, embedding_size=300),
    )
    decoder = {"kind": "diffusion", "context": {"kind": "residual", "init_from": "reference"}}
    for given, match in (
        ({"decoder": decoder, "reference": small}, "the reference has vocab_size=300"),
        ({"decoder": decoder}, "init_from='reference', and that needs one"),
        ({"decoder": {"kind": "diffusion"}, "reference": path}, "a reference model belongs to"),
        ({"reference": path}, "of no use without a decoder"),
    ):
        for use in (models.locate, models.load):
            with pytest.raises(ConfigError, match=match):
                use(ModelEntry(path=path, **given))
    with pytest.raises(CheckpointError, match='model "a\'s reference": no weights'):
        models.load(ModelEntry(path=path, decoder=decoder, reference=str(tmp_path / "none")))
