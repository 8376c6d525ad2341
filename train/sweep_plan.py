# SPDX-License-Identifier: Apache-2.0
"""Plan a sweep from FLOPs: which jobs, in what order, at what cost. Nothing here imports jax.

The trunk of a size is cut where its cooldowns branch off. Each piece is a job that continues from
the last checkpoint of the piece before, so cooldowns start early, a kill loses little, and a budget
added later, at either end or in between, finds the pieces before it done.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sqzjax.errors import ConfigError
from sqzjax.models.swin_config import COORDINATES
from train.config import TrainConfig
from train.continual import Branch
from train.cost import rollout_of, step_flops
from train.optim import Cosine
from train.sweep_config import Selection, SweepConfig, number_name

JOBS = "jobs"
LEAST_SIZES = 3
"""A parabola has three coefficients."""
_MANY_STEPS = 1 << 40


@dataclass(frozen=True)
class Size:
    """A model and what one training step of its trunk costs.

    `flops` counts operations, `data` the samples or tokens that `unit` names. `counted_params` are
    the published way to count: without biases (emulators), or embeddings (language models);
    `body_params` are without patch embedding, embeddings and head.
    """

    name: str
    config: TrainConfig
    params: int
    counted_params: int
    body_params: int
    flops: float
    data: int
    unit: Literal["samples", "tokens"]


@dataclass(frozen=True)
class Job:
    """One training run, from step `start` to `config.steps`, after the job that it `needs`.

    `budget` is the FLOPs that the whole of it was planned for (None: a piece of a trunk), at the
    cost of the trunk; a step of this job itself takes `step_flops`.
    """

    name: str
    size: Size
    role: Literal["trunk", "cooldown", "cosine"]
    variant: str
    budget: float | None
    start: int
    needs: str | None
    config: TrainConfig
    step_flops: float

    @property
    def steps(self) -> int:
        """The step at which the job ends."""
        return self.config.steps

    @property
    def flops(self) -> float:
        """Training FLOPs of this job alone."""
        return self.step_flops * (self.steps - self.start)

    @property
    def total_flops(self) -> float:
        """Training FLOPs from step 0 to the end of this job, its trunk included."""
        return self.size.flops * self.start + self.flops


@dataclass(frozen=True)
class Skipped:
    """A pair of size and budget outside of the allowed numbers of steps."""

    size: str
    budget: float
    reason: str


@dataclass(frozen=True)
class SweepPlan:
    """All jobs by name, each after the one it needs, and the pairs that were left out."""

    jobs: Mapping[str, Job]
    skipped: tuple[Skipped, ...]
    unit: str

    def warnings(self, budgets: Iterable[float]) -> list[str]:
        """Return what makes the result less than it should be."""
        lines = []
        for budget in budgets:
            sizes = [j.size.name for j in self.points(budget)]
            if len(sizes) < LEAST_SIZES:
                lines.append(
                    f"budget {number_name(budget)} has {len(sizes)} of at least {LEAST_SIZES} "
                    f"sizes ({', '.join(sizes) or 'none'}): no curve can be fitted to it"
                )
        return lines

    def points(self, budget: float) -> Iterator[Job]:
        """Yield the plain cooldowns of a budget."""
        for job in self.jobs.values():
            if job.role == "cooldown" and not job.variant and job.budget == budget:
                yield job


def make_plan(config: SweepConfig, workdir: Path) -> SweepPlan:
    """Return the jobs of a sweep in `workdir`; `ConfigError` lists every size that is wrong."""
    sizes, problems = {}, []
    for name in config.sizes:
        try:
            derived = config.size_config(name)
            problems += config.bad_training(derived, f"sizes.{name}")
            sizes[name] = measure(name, derived)
        except ConfigError as error:
            problems += error.problems
        except ValueError as error:
            problems.append(f"sizes.{name}: {error}")
    units = {size.unit for size in sizes.values()}
    if len(units) > 1:
        problems.append("sizes: language models and emulators cannot share a sweep")
    if problems:
        raise ConfigError(problems)
    builder = _Builder(config, Path(workdir).absolute() / JOBS)
    for size in sizes.values():
        builder.add(size)
    _check_variants(builder.jobs.values())
    if not builder.jobs:
        reasons = [f"{s.size} at {number_name(s.budget)}: {s.reason}" for s in builder.skipped]
        raise ConfigError(["no pair of size and budget is left", *reasons])
    return SweepPlan(_in_order(builder.jobs), tuple(builder.skipped), units.pop())


def _check_variants(jobs: Iterable[Job]) -> None:
    """Show each variant's settings to the model once: an objective may not suit it."""
    first = {job.variant: job for job in jobs if job.variant}
    for name, job in first.items():
        try:
            job.config.resolve_model()
        except ValueError as error:
            raise ConfigError(f"variants.{name}: {error}") from error


def measure(name: str, config: TrainConfig) -> Size:
    """Return what one step of a run costs."""
    model = config.resolve_model()
    if config.family == "fields":
        width, area = model.embed_dim, model.patch_size**2
        ends = (model.in_channels + COORDINATES + model.out_channels) * area * width + 2 * width
        counted, body = model.counted_params, model.counted_params - ends
    else:
        tables = 1 if model.tie_embeddings else 2
        counted = body = model.num_params - tables * model.embedding_size * model.hidden_size
    fields = config.family == "fields"
    return Size(
        name=name,
        config=config,
        params=model.num_params,
        counted_params=counted,
        body_params=body,
        flops=step_flops(config, model),
        data=config.batch_size * (1 if fields else config.seq_len),
        unit="samples" if fields else "tokens",
    )


class _Builder:
    """Collects the jobs of one size after another."""

    def __init__(self, config: SweepConfig, folder: Path):
        self.config, self.folder = config, folder
        self.jobs: dict[str, Job] = {}
        self.skipped: list[Skipped] = []

    def add(self, size: Size) -> None:
        """Add the trunk of a size, cut at its branch points, and what branches off."""
        lengths = self._lengths(size)
        starts = {steps: steps - int(self.config.cooldown * steps) for steps in lengths.values()}
        trunks: dict[int, Job] = {}
        trunk = None
        for start in sorted(set(starts.values())):
            name, config = f"trunk_{start:07d}", _cooled(size.config, 0.0)
            trunk = trunks[start] = self._put(size, "trunk", name, config, start, trunk)
        chosen = {"": Selection(), **self.config.variants}
        configs = {name: self._variant(size, name) for name in chosen}
        for budget, steps in lengths.items():
            point = f"{size.name}@{number_name(budget)}"
            trunk = trunks[starts[steps]]
            for name, config in configs.items():
                if chosen[name].includes(size.name, budget):
                    full = f"{point}+{name}" if name else point
                    self._put(size, "cooldown", full, config, steps, trunk, budget, name)
            if self.config.cosine is not None and self.config.cosine.includes(size.name, budget):
                config = self._cosine(size)
                self._put(size, "cosine", f"{point}+cosine", config, steps, budget=budget)

    def _lengths(self, size: Size) -> dict[float, int]:
        """Return the steps of each budget that has an allowed number of them."""
        lengths = {}
        for budget in self.config.budgets:
            steps = round(budget / size.flops)
            if steps < self.config.min_steps:
                reason = f"{steps:,} steps are below min_steps={self.config.min_steps:,}"
            elif steps > self.config.max_steps:
                reason = f"{steps:,} steps are above max_steps={self.config.max_steps:,}"
            else:
                lengths[budget] = steps
                continue
            self.skipped.append(Skipped(size.name, budget, reason))
        return lengths

    def _variant(self, size: Size, name: str) -> TrainConfig:
        config = size.config
        if name:
            config = self.config.variant_config(size.name, name)
        return _cooled(config, self.config.cooldown)

    def _step_flops(self, size: Size, config: TrainConfig) -> float:
        if config.objective == size.config.objective:
            return size.flops
        return step_flops(config, size.config.model.resolve())

    def _cosine(self, size: Size) -> TrainConfig:
        assert self.config.cosine is not None
        trunk = size.config.schedule
        schedule = Cosine(
            learning_rate=trunk.learning_rate,
            warmup_steps=trunk.warmup_steps,
            final_ratio=self.config.cosine.final_ratio,
        )
        return replace(size.config, schedule=schedule)

    def _put(
        self,
        size: Size,
        role: Literal["trunk", "cooldown", "cosine"],
        name: str,
        config: TrainConfig,
        steps: int,
        source: Job | None = None,
        budget: float | None = None,
        variant: str = "",
    ) -> Job:
        name = f"{size.name}/{name}"
        branch = None
        if source is not None:
            branch = Branch(run=str(self.folder / source.name), step=source.steps)
        try:
            config = replace(config, steps=steps, branch=branch)
        except ValueError as error:
            raise ConfigError(f"job {name}: {error}") from error
        self.jobs[name] = Job(
            name=name,
            size=size,
            role=role,
            variant=variant,
            budget=budget,
            start=0 if source is None else source.steps,
            needs=None if source is None else source.name,
            config=config,
            step_flops=self._step_flops(size, config),
        )
        return self.jobs[name]


def _cooled(config: TrainConfig, fraction: float) -> TrainConfig:
    """Return a run with another cooldown; its length is checked once `steps` is known."""
    schedule = replace(config.schedule, cooldown=fraction)
    return replace(config, schedule=schedule, steps=_MANY_STEPS)


def _in_order(jobs: Mapping[str, Job]) -> dict[str, Job]:
    """Sort by the FLOPs of the longest chain that waits for a job: that decides when all is done.

    A job comes before those that need it, because their chains are part of its own.
    """
    waiting: dict[str, list[Job]] = {name: [] for name in jobs}
    for job in jobs.values():
        if job.needs is not None:
            waiting[job.needs].append(job)

    def chain(job: Job) -> float:
        return job.flops + max((chain(after) for after in waiting[job.name]), default=0.0)

    return {job.name: job for job in sorted(jobs.values(), key=lambda job: -chain(job))}


def cost_table(config: SweepConfig, plan: SweepPlan, states: Mapping[str, str]) -> str:
    """Return a table of what each job costs, what was left out, and warnings."""
    head = ["job", "from", "to", plan.unit, "FLOPs", "epochs", "core time", "state"]
    rows = [[*_costs(config, job), states.get(job.name, "-")] for job in plan.jobs.values()]
    left = [job for name, job in plan.jobs.items() if states.get(name) != "done"]
    rows.append(_sum(config, f"total of {len(rows)} jobs", plan.jobs.values()))
    if len(left) < len(plan.jobs):
        rows.append(_sum(config, f"still to do: {len(left)}", left))
    lines = [align([head, *rows])]
    if plan.skipped:
        lines.append("left out:")
        lines += [f"  {s.size}@{number_name(s.budget)}: {s.reason}" for s in plan.skipped]
    lines += [f"warning: {text}" for text in plan.warnings(config.budgets)]
    return "\n".join(lines)


def _sum(config: SweepConfig, name: str, jobs: Collection[Job]) -> list[str]:
    """Return the row of what some jobs cost together."""
    total = sum(job.flops for job in jobs)
    data = sum((job.steps - job.start) * job.size.data for job in jobs)
    return [name, "", "", f"{data:,}", f"{total:.3e}", "", _duration(config, total), ""]


def _costs(config: SweepConfig, job: Job) -> list[str]:
    data = job.steps * job.size.data
    epochs = "-" if config.epoch_size is None else f"{data / config.epoch_size:.2f}"
    return [
        job.name,
        f"{job.start:,}",
        f"{job.steps:,}",
        f"{data - job.start * job.size.data:,}",
        f"{job.flops:.3e}",
        epochs,
        _duration(config, job.flops),
    ]


def _duration(config: SweepConfig, flops: float) -> str:
    if config.flops_per_second is None:
        return "-"
    seconds = flops / config.flops_per_second
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def align(rows: list[list[str]], gap: str = "  ") -> str:
    """Return rows as text columns, the first flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        gap.join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def loss_kind(job: Job) -> str:
    """Return a name of what the held-out loss of a job measures; equal names are comparable.

    A variant's is its own even where the objective is the trunk's: a fit has room for one loss per
    size and budget.
    """
    kind = _error_of(job.config)
    return f"{kind} ({job.variant})" if job.variant and kind == _error_of(job.size.config) else kind


def _error_of(config: TrainConfig) -> str:
    error = getattr(config.objective, "error", config.objective.kind)
    rollout = rollout_of(config)
    return error if rollout == 1 else f"{error}, {rollout} steps"
