# SPDX-License-Identifier: Apache-2.0
"""Build everything a run consists of from its configuration: data, model, mesh, step, state."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sqzjax import config as configs
from sqzjax.errors import ConfigError
from sqzjax.io.checkpoint import Checkpointer
from sqzjax.io.tokenizer import load as load_tokenizer
from sqzjax.models.fit import fingerprint
from sqzjax.typing import Params
from train import data, lora, state
from train.config import TrainConfig
from train.ema import Average
from train.families import Columns, family_of
from train.model_source import AnyModel, Pretrained
from train.plan import lay_out, make_plan, reference_model
from train.state import Frozen, TrainState
from train.step import INIT_KEY, LORA_KEY, REFERENCE_KEY, Program, Step, role_key

_log = logging.getLogger(__name__)


class Session:
    """The parts of one run. Cheap until `initial_state`, `restore` or `compile` is called."""

    def __init__(self, config: TrainConfig, workdir: Path):
        self.config = config
        self.family = family_of(config)
        model_config = config.resolve_model()
        self.dataset = data.open_data(
            config.data,
            seed=config.seed,
            batch_size=config.batch_size,
            row_length=config.row_length,
            cache_dir=workdir / "data",
            parent_dir=None if config.branch is None else Path(config.branch.run) / "data",
        )
        _warn_of_tokenizer(config, self.dataset)
        model_config = self.family.complete(model_config, self.dataset)
        self.model = self.family.define(model_config, config.execution)
        if check_data := getattr(config.objective, "check_data", None):
            check_data(self.dataset, self.model.config)
        self.layout = lay_out(config, self.model)
        self.mesh = self.layout.mesh
        self.plan = make_plan(config, self.model, self.layout)
        self.item = "params" if config.lora is None else "lora"
        self.step = build_step(config, self.model)
        self.average = self.step.average
        self.frozen_marks: dict[str, str] = {}
        """Digests of the frozen weights by the setting that names them, once they are read."""

    # State.

    def base_params(self) -> Params:
        """Read or create the parameters that the run starts from."""
        base = self.layout.frozen.base
        abstract = self.layout.state.trained if base is None else base
        return self._params(self.config.model, self.model, abstract, INIT_KEY)

    def _params(self, source: AnyModel, model: Any, abstract: Any, role: int) -> Params:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return self.family.load(source, model, shardings, role_key(self.config.seed, role))

    def frozen_params(self) -> Frozen:
        """Return what is beside the trained parameters: a LoRA base, what the objective needs."""
        base = reference = None
        if self.config.lora is not None:
            base = self.base_params()
            self.frozen_marks["model"] = fingerprint(self.model, base)
        source, model = self.config.reference, self.step.reference
        if source is not None and model is not None:
            abstract = self.layout.frozen.reference
            reference = self._params(source, model, abstract, REFERENCE_KEY)
            self.frozen_marks["objective.reference"] = fingerprint(model, reference)
        return Frozen(base, reference, self._tables())

    def _tables(self) -> Any:
        abstract = self.layout.frozen.tables
        if abstract is None:
            return None
        objective: Any = self.config.objective
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return jax.device_put(objective.tables(self.model.config), places)

    def initial_state(self) -> TrainState:
        """Return the state at step 0, on the mesh."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.layout.state)

        def create(trained: Params) -> TrainState:
            return state.create(trained, self.step.optimizer, self.average)

        if self.config.lora is None:
            trained = self.base_params()
        else:
            key = role_key(self.config.seed, LORA_KEY)
            trained = lora.init(self.config.lora, self.layout.frozen.base, key)
        return jax.jit(create, out_shardings=shardings, donate_argnums=0)(trained)

    def restore(
        self, checkpoints: Checkpointer, step: int | None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Return the state and `meta` of a step (None: the newest intact one).

        The model and the data must be those of the checkpoint, and so must the frozen weights, if
        `frozen_params` has read them.
        """
        wanted = state.to_items(self.layout.state, self.item)
        restored = checkpoints.restore(step, wanted)
        self._check_model(restored.meta)
        found = self.dataset.check_state(restored.meta["data"])
        if found != restored.step:
            raise ConfigError(f"checkpoint {restored.step} holds the data state of step {found}")
        return state.from_items(restored.items, self.item), restored.meta

    def _check_model(self, meta: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, whose parameters may have the same shapes."""
        now, trained = configs.to_dict(self.model.config), dict(meta["model"])
        # An adapter is stored without the factor that its alpha gives it.
        if self.config.lora is not None and (held := meta["config"].get("lora")) is not None:
            now["lora.alpha"], trained["lora.alpha"] = self.config.lora.alpha, held["alpha"]
        changed = [
            f"{name} was {trained[name]!r} and is {now[name]!r}"
            for name in sorted(now.keys() & trained.keys())
            if now[name] != trained[name]
        ]
        if changed:
            raise ConfigError(
                f"the model differs from the checkpoint's: {'; '.join(changed)}; restore the "
                "setting, or train in another --workdir from the run's export"
            )
        held = meta.get("frozen", {})
        for name, mark in self.frozen_marks.items():
            if held.get(name, mark) != mark:
                raise ConfigError(
                    f"{name}: its frozen weights are not those that the checkpoint was trained "
                    "with; put them back, or train in another --workdir"
                )

    def branch_state(self) -> TrainState:
        """Return the state of the other run's checkpoint that this run branches from.

        Parameters, moments, counters and the position in the data go on; the data may differ in
        what a branch is there to change (`Pipeline.branch_may_change`).
        """
        branch = self.config.branch
        assert branch is not None
        folder = Path(branch.run) / "checkpoints"
        if not folder.is_dir():
            raise ConfigError(f"branch.run={branch.run!r} has no checkpoints; train that run first")
        wanted = state.to_items(self.layout.state, self.item)
        restored = Checkpointer(folder).restore(branch.step, wanted)
        self._check_model(restored.meta)
        self.dataset.check_state(restored.meta["data"], branch=True)
        _log.info("branching from step %d of %s", branch.step, branch.run)
        return state.from_items(restored.items, self.item)

    # Programs.

    def compile(self) -> Program:
        """Compile the training step for this mesh and batch shape."""
        abstract = self.layout.state
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        program = Program(
            self.step.train,
            (abstract, self.layout.frozen, self.abstract_batch()),
            out_shardings=(shardings, None),
            donate=(0,),
        )
        _log.info("compiled the step; intermediate results: %s bytes", program.temporary_bytes)
        return program

    def compile_eval(self) -> Program:
        """Compile the held-out loss."""
        abstract = self.layout.state
        trained = abstract.trained if self.average is None else abstract.average
        index = jax.ShapeDtypeStruct((), np.int32)
        return Program(
            self.step.evaluate, (trained, self.layout.frozen, self.abstract_batch(), index)
        )

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shapes, dtypes and shardings of a batch."""
        return abstract_batch(self.config, self.dataset.columns, self.mesh)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Place a batch on the mesh."""
        places = {name: self.family.sharding(self.mesh, a.ndim) for name, a in batch.items()}
        return jax.device_put(batch, places)

    def export_params(self, state: TrainState, frozen: Frozen) -> Params:
        """Return the trained model's parameters: the average if there is one, LoRA merged."""
        trained = state.trained if state.average is None else state.average
        if self.config.lora is None:
            return trained
        return lora.merge(self.config.lora, frozen.base, trained)


def _warn_of_tokenizer(config: TrainConfig, dataset: Any) -> None:
    """Say that a model gets its text in another form than before or after its training."""
    source, used = config.model, getattr(dataset, "tokenizer", None)
    if used is None:
        return
    asked = getattr(config.data, "add_bos", None)
    if asked is not None and asked != used.adds_bos:
        _log.warning(
            "data.add_bos=%s, but evaluation and generation follow the tokenizer, which begins "
            "texts with%s a bos; leave data.add_bos out to train as they do",
            str(asked).lower(),
            "" if used.adds_bos else "out",
        )
    if not isinstance(source, Pretrained):
        return
    file = Path(source.path) / "tokenizer.json"
    if file.is_file() and load_tokenizer(file.parent).fingerprint != used.fingerprint:
        _log.warning(
            "the model has another tokenizer than the data's; to use it, set data.tokenizer: "
            "{kind: files, path: %s}",
            source.path,
        )


def build_step(config: TrainConfig, model: Any) -> Step:
    """Return everything static about the training step of a run."""
    schedule, steps = config.schedule, config.steps
    if config.branch is not None:
        schedule = config.branch.schedule(schedule, steps)
    return Step(
        model=model,
        objective=config.objective,
        optimizer=config.optimizer.build(),
        rate=lambda step: schedule.rate(step, steps),
        seed=config.seed,
        accumulation=config.accumulation,
        clip_norm=config.stability.clip_norm,
        lora=config.lora,
        reference=reference_model(config),
        average=None if config.ema is None else Average(config.ema),
    )


def abstract_batch(
    config: TrainConfig, columns: Columns, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes, dtypes and shardings of a batch with such columns."""
    family = family_of(config)

    def describe(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        place = family.sharding(mesh, len(shape) + 1)
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=place)

    return {name: describe(*column) for name, column in columns.items()}
