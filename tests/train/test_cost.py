# SPDX-License-Identifier: Apache-2.0
"""FLOPs of training steps: by hand for every objective, and the same for sweeps and for MFU."""

from dataclasses import replace

import pytest

from sqzjax.analysis import training_flops
from sqzjax.models import ModelConfig, SpecialTokens
from sqzjax.models.swin_config import SwinConfig
from sqzjax.residual_config import ResidualSettings
from sqzjax.sphere.grid import Grid
from tests.tolerances import FLOAT64_REL
from train.config import TrainConfig
from train.cost import step_flops
from train.data.fields_config import FieldData
from train.families import family_of
from train.model_source import Custom, Swin
from train.objectives import CDLM, RCD, BlockDiffusion, Forecast, LanguageModeling, MaskedDiffusion
from train.sweep_plan import measure

ROWS, LENGTH, BLOCK = 4, 32, 8
MODEL = ModelConfig(
    vocab_size=100,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=2,
    mask="block_causal",
    block_size=BLOCK,
    tokens=SpecialTokens(mask=99),
)
SMALL = replace(MODEL, num_layers=1, hidden_size=8)
CAUSAL, BOTH = replace(MODEL, mask="causal"), replace(MODEL, mask="bidirectional")
SOURCE = Custom(config=SMALL)


def run_of(objective, model=MODEL):
    return TrainConfig(
        model=Custom(config=model), objective=objective, batch_size=ROWS, seq_len=LENGTH
    )


def body(model, length=LENGTH):
    """Forward FLOPs of the layers: two per weight and token, and two products of all scores."""
    weights = model.hidden_size * (4 * model.num_heads * model.head_dim)
    weights += 3 * model.hidden_size * model.intermediate_size
    scores = 4 * model.num_heads * model.head_dim * length
    return ROWS * length * model.num_layers * (2 * weights + scores)


def head(model, predicted):
    return 2 * ROWS * predicted * model.hidden_size * model.vocab_size


def test_plain_objectives_cost_what_the_roofline_says():
    for objective, model in ((LanguageModeling(), CAUSAL), (MaskedDiffusion(), BOTH)):
        found = step_flops(run_of(objective, model), model)
        assert found == training_flops(model, ROWS, LENGTH)
        matrices = 3 * (body(model) + head(model, LENGTH))
        assert found == pytest.approx(matrices, rel=FLOAT64_REL)


def test_block_diffusion_runs_texts_of_twice_the_length():
    plain = step_flops(run_of(BlockDiffusion()), MODEL)
    assert plain == pytest.approx(
        3 * (body(MODEL, 2 * LENGTH) + head(MODEL, LENGTH)), rel=FLOAT64_REL
    )
    assert step_flops(run_of(BlockDiffusion(complementary=True)), MODEL) == 2 * plain


def test_residuals_add_a_forward_pass_of_the_reference_and_two_products_of_masked_tokens():
    plain = step_flops(run_of(BlockDiffusion()), MODEL)
    extra = body(SMALL, 2 * LENGTH) + head(SMALL, LENGTH / 2) + 2 * head(MODEL, LENGTH / 2)
    found = step_flops(run_of(RCD(reference=SOURCE)), MODEL)
    assert found == pytest.approx(plain + extra, rel=FLOAT64_REL)
    off = RCD(reference=SOURCE, residual=ResidualSettings(alpha_scale=0.0))
    assert step_flops(run_of(off), MODEL) == plain


def test_distillation_costs_the_passes_that_its_weights_ask_for():
    once = body(MODEL) + head(MODEL, LENGTH)
    block = 3 * head(MODEL, BLOCK) + head(SMALL, BLOCK)
    for weights, wanted in (
        ((1, 1, 1), 3 * once + block + once + 3 * once),
        ((1, 0, 0), 3 * body(MODEL) + block),
        ((0, 1, 0), 3 * once + once),
        ((0, 0, 1), 3 * once),
    ):
        names = ("distillation", "consistency", "mask_prediction")
        objective = CDLM(**dict(zip(names, weights)), reference=SOURCE)
        assert step_flops(run_of(objective), MODEL) == pytest.approx(wanted, rel=FLOAT64_REL)


def test_sweeps_and_the_trainer_count_alike():
    grid = Grid(latitudes=8, longitudes=16, layout="cells")
    swin = SwinConfig(grid=grid, in_channels=4, out_channels=2, embed_dim=8, depth=2, patch_size=2)
    swin = replace(swin, window=(2, 4))
    fields = TrainConfig(
        model=Swin(config=swin), data=FieldData(path="x"), objective=Forecast(rollout=3)
    )
    texts = [run_of(LanguageModeling(), CAUSAL), run_of(BlockDiffusion(complementary=True))]
    for config in (fields, *texts, run_of(RCD(reference=SOURCE))):
        size = measure("a", config)
        assert size.flops == family_of(config).step_flops(config, config.resolve_model())
        assert size.data == family_of(config).units_per_step(config)
    # Beside the blocks: channels and coordinates of 2 x 2 points, 8 features, two biases.
    body = measure("a", fields).body_params
    assert body == 2 * (12 * 64 + 4 * 8)
    assert measure("a", fields).counted_params == body + (4 + 4 + 2) * 4 * 8 + 2 * 8
