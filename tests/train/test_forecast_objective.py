# SPDX-License-Identifier: Apache-2.0
"""The forecast objective on a small emulator: its sums, its metrics, training, and refusals."""

import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sqzjax import config as configs
from sqzjax import forecast_losses as losses
from sqzjax.errors import ConfigError
from sqzjax.fields.channel_weights import channel_weights
from sqzjax.models import Execution
from sqzjax.models.swin import SwinEmulator
from sqzjax.models.swin_config import SwinConfig
from sqzjax.sphere import Grid, Transform
from tests.tolerances import FORECAST_REL
from train.objectives import Forecast
from train.state import Frozen
from train.step import Step

NAMES = ("temperature_500", "surface_pressure")
CONFIG = SwinConfig(
    grid=Grid(latitudes=8, longitudes=16, layout="gauss"),
    in_channels=3,
    out_channels=2,
    embed_dim=16,
    depth=1,
    num_heads=2,
    patch_size=2,
    window=(2, 4),
)


@dataclass(frozen=True)
class Stencil:
    """Linear emulator: each channel of a point from its neighbours along the row."""

    config: SwinConfig
    execution: Execution = Execution()

    def init_params(self, key):
        shape = (5, self.config.context * self.config.in_channels, self.config.out_channels)
        return {"taps": 0.3 * jax.random.normal(key, shape)}

    def forward(self, params, fields):
        flat = fields.reshape(fields.shape[0], -1, *fields.shape[3:])
        near = jnp.stack([jnp.roll(flat, shift, axis=-1) for shift in range(-2, 3)])
        return jnp.einsum("sbihw,sio->bohw", near, params["taps"])


MODEL = Stencil(CONFIG)
OBJECTIVES = {
    "mse": Forecast(),
    "weighted": Forecast(error="weighted_mse", channels=NAMES),
    "given": Forecast(error="weighted_mse", channel_weights=(3.0, 1.0), rollout=2),
    "amse": Forecast(error="amse", unresolved=0.5),
    "amse few": Forecast(error="amse", truncation=4, channel_weights=(3.0, 1.0), rollout=3),
}
objectives = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())


@pytest.fixture(scope="module")
def params():
    return jax.jit(MODEL.init_params)(jax.random.key(0))


def make_batch(rollout: int = 1, rows: int = 4, context: int = 1) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shape = (rows, context + rollout, 2, 8, 16)
    return {
        "fields": jnp.asarray(rng.normal(size=shape), jnp.float32),
        "constants": jnp.asarray(rng.normal(size=(rows, 1, 8, 16)), jnp.float32),
        "weight": jnp.ones(rows, jnp.float32),
    }


@partial(jax.jit, static_argnames=("objective", "model"))
def run(objective, params, batch, model=MODEL):
    return objective.loss(model, params, batch, jax.random.key(0), train=True)


@objectives
def test_sum_and_metrics_are_those_of_the_states(objective, params):
    batch = make_batch(objective.rollout)
    out = run(objective, params, batch)
    fields = np.asarray(batch["fields"])
    truth = fields[:, 1:]
    state, states = fields[:, 0], []
    for _ in range(objective.rollout):
        inputs = np.concatenate([state, batch["constants"]], axis=1)[:, None]
        state = jax.jit(MODEL.forward)(params, inputs)
        states.append(state)
    states = np.stack(states, axis=1)
    weights = {"weighted": channel_weights(NAMES), "given": (1.5, 0.5), "amse few": (1.5, 0.5)}
    weight = next(
        (weights[n] for n, o in OBJECTIVES.items() if o is objective and n in weights), None
    )
    wanted = {
        "mse": losses.mse,
        "weighted_mse": lambda *both: losses.weighted_mse(*both, CONFIG.grid, weight),
        "amse": lambda states, truth: losses.amse(
            states,
            truth,
            Transform(CONFIG.grid, objective.truncation),
            channel_weights=weight,
            unresolved=objective.unresolved,
        ),
    }[objective.error]
    wanted = jax.jit(wanted)(states, truth)
    assert float(out.weight) == 4
    np.testing.assert_allclose(out.sum, wanted.mean(1).sum(), rtol=FORECAST_REL)
    mean = {name: total / weight for name, (total, weight) in out.metrics.items()}
    np.testing.assert_allclose(mean.pop("mse"), np.square(states - truth).mean(), rtol=FORECAST_REL)
    area = np.cos(np.radians(CONFIG.grid.latitude()))
    for step in range(objective.rollout):
        square = np.square(states[:, step] - truth[:, step]).mean(-1) @ area / area.sum()
        found = mean.pop(f"rmse_step_{step + 1}")
        np.testing.assert_allclose(found, np.sqrt(square).mean(), rtol=FORECAST_REL)
    assert not mean


@pytest.mark.parametrize("name", ["amse", "amse few"])
def test_tables_are_an_argument_of_the_step(name, params):
    objective = OBJECTIVES[name]
    batch, key = make_batch(objective.rollout), jax.random.key(0)
    step = Step(MODEL, objective, optax.sgd(1.0), rate=lambda step: 1e-3)
    tables = objective.tables(CONFIG)
    shapes = objective.tables(CONFIG, abstract=True)
    assert jax.tree.map(np.shape, tables) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    loss = jax.jit(partial(step._loss, train=True))
    found = loss(params, Frozen(tables=tables), batch, key)
    wanted = run(objective, params, batch)
    np.testing.assert_allclose(found.sum, wanted.sum, rtol=FORECAST_REL)
    texts = [loss.lower(params, Frozen(tables=t), batch, key).as_text() for t in (shapes, None)]
    assert len(texts[0]) < len(texts[1])
    assert Forecast().tables(CONFIG) is None


@objectives
def test_rows_add_up_and_padding_counts_nothing(objective, params):
    batch = make_batch(objective.rollout)
    whole = run(objective, params, batch)
    parts = []
    for kept in ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [0.0] * 4):
        shown = {
            name: np.asarray(x) * np.array(kept, np.float32).reshape(-1, *[1] * (x.ndim - 1))
            for name, x in batch.items()
        }
        parts.append(run(objective, params, shown))
    summed = jax.tree.map(np.add, *parts[:2])
    for found, wanted in zip(jax.tree.leaves(summed), jax.tree.leaves(whole)):
        np.testing.assert_allclose(found, wanted, rtol=FORECAST_REL)
    assert not any(map(float, jax.tree.leaves(parts[2])))


@pytest.mark.parametrize("name", ["mse", "amse few"])
def test_a_context_of_two_rolls_on_with_its_own_states(name, params):
    del params
    objective = OBJECTIVES[name]
    model = Stencil(replace(CONFIG, context=2))
    params = jax.jit(model.init_params)(jax.random.key(1))
    batch = make_batch(objective.rollout, context=2)
    out = run(objective, params, batch, model)
    # What comes before the context, or would come after the rollout, is not in a sample.
    with pytest.raises(ValueError, match="cannot train a rollout"):
        run(objective, params, make_batch(objective.rollout + 1, context=2), model)
    fields, constants = (np.asarray(batch[name]) for name in ("fields", "constants"))
    inputs = np.concatenate([fields[:, :2], constants[:, None].repeat(2, 1)], axis=2)
    first = np.asarray(jax.jit(model.forward)(params, inputs))
    square = np.square(first - fields[:, 2]).mean(-1)
    area = CONFIG.grid.area_weights()
    rmse = np.sqrt((square * area).mean(-1)).mean(-1)
    np.testing.assert_allclose(out.metrics["rmse_step_1"][0], rmse.sum(), rtol=FORECAST_REL)


def turning_batch(rollout: int) -> dict[str, jax.Array]:
    """Eight samples that can be learnt: the next state is the last one turned by two columns."""
    batch = make_batch(rollout, rows=8)
    states = [np.roll(batch["fields"][:, 0], 2 * step, axis=-1) for step in range(rollout + 1)]
    return {**batch, "fields": np.stack(states, axis=1)}


def learn(objective, model, rate, steps):
    """Return the losses of some steps of Adam on eight samples."""
    batch, params = turning_batch(objective.rollout), jax.jit(model.init_params)(jax.random.key(0))
    optimizer = optax.adam(rate)

    @jax.jit
    def train(params, batch):
        def step(carry, _):
            params, state = carry

            def mean(params):
                out = objective.loss(model, params, batch, jax.random.key(0), train=True)
                return out.sum / out.weight

            value, slope = jax.value_and_grad(mean)(params)
            updates, state = optimizer.update(slope, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)[1]

    return train(params, batch)


def test_a_linear_emulator_learns_eight_samples():
    values = learn(OBJECTIVES["given"], MODEL, rate=3e-2, steps=200)
    assert np.isfinite(values).all()
    assert values[-1] < 0.05 * values[0]


@pytest.mark.slow
def test_the_swin_emulator_learns_by_its_spectra():
    model = SwinEmulator(CONFIG, Execution(scan_layers=False))
    values = learn(Forecast(error="amse"), model, rate=5e-3, steps=60)
    assert values[-1] < 0.7 * values[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"error": "mae"}, "error"),
        ({"rollout": 0}, "rollout=0 must be an integer >= 1"),
        ({"error": "mse", "channels": NAMES}, "weighs no channels"),
        ({"error": "weighted_mse", "channels": NAMES, "channel_weights": [1.0]}, "1 numbers for 2"),
        ({"error": "amse", "channel_weights": [1.0, -1.0]}, "finite numbers >= 0"),
        ({"error": "amse", "channel_weights": [0.0, 0.0]}, "must not all be zero"),
        ({"error": "mse", "truncation": 3}, "is of error: amse"),
        ({"error": "mse", "unresolved": 1.0}, "is of error: amse"),
        ({"loss": "amse"}, "loss"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        configs.load(Forecast, {"kind": "forecast", **settings})


def test_what_does_not_suit_model_or_data_is_refused():
    Forecast(error="amse", truncation=7).check(CONFIG)
    with pytest.raises(ValueError, match="weights of 3 channels"):
        Forecast(error="amse", channel_weights=(1.0, 1.0, 1.0)).check(CONFIG)
    with pytest.raises(ValueError, match="truncation=9"):
        Forecast(error="amse", truncation=9).check(CONFIG)
    region = Grid(latitudes=8, longitudes=16, layout="region", north=60.0, spacing=1.0)
    with pytest.raises(ValueError, match="piece of the sphere"):
        Forecast(error="amse").check(replace(CONFIG, grid=region))
    Forecast(error="weighted_mse").check(replace(CONFIG, grid=region))
    data = SimpleNamespace(channels=NAMES[::-1])
    with pytest.raises(ConfigError, match="same order"):
        Forecast(error="weighted_mse", channels=NAMES).check_data(data, CONFIG)
    data = SimpleNamespace(channels=NAMES)
    Forecast(error="weighted_mse", channels=("t_500", "sp")).check_data(data, CONFIG)
    with pytest.raises(ValueError, match=r"rollout=1\.5 must be an integer"):
        Forecast(rollout=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="remove lora"):
        Forecast().check_run(data_kind="fields", adapters=True)


def test_settings_are_checked_without_jax():
    code = (
        "import sys; from train.objectives import Forecast\n"
        "from sqzjax.models.swin_config import SwinConfig; from sqzjax.sphere import Grid\n"
        "grid = Grid(latitudes=8, longitudes=16)\n"
        "config = SwinConfig(grid=grid, in_channels=1, out_channels=1, embed_dim=8, depth=1,"
        " patch_size=2)\n"
        "Forecast(error='amse').check(config); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
