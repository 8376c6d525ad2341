# SPDX-License-Identifier: Apache-2.0
"""Continual training (arXiv 2603.25687): one trunk at a constant rate, short cooldowns off it.

Pick it when several training lengths, losses or model sizes are compared: every length costs one
cooldown instead of a run of its own. The rate before the cooldown does not depend on the length of
the run, so the weights of a trunk serve every branch, bit for bit. Nothing here imports jax before
a rate is computed.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Continual:
    """Linear warm-up, constant rate, and a cooldown that ends at exactly 0.

    The cooldown takes `int(cooldown * steps)` steps, or `cooldown_steps`. Without either, a run
    is a trunk and stays constant, and a run with a `branch` cools down from its first step; 0 is
    constant in both. Step x of the warm-up has the rate `learning_rate * (x + 1) / warmup_steps`,
    cooldown step j = 1..n has `learning_rate * (1 - sqrt(j / n))`, or `1 - j / n` for `linear`.
    """

    kind: Literal["continual"] = "continual"
    learning_rate: float = 5e-4
    warmup_steps: int = 500
    cooldown: float | None = None
    cooldown_steps: int | None = None
    shape: Literal["1-sqrt", "linear"] = "1-sqrt"

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate={self.learning_rate} must be a number > 0; 5e-4 is usual"
            )
        for name in ("warmup_steps", "cooldown_steps"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0")
        if self.cooldown is not None and not 0 <= self.cooldown <= 1:
            raise ValueError(f"cooldown={self.cooldown} must lie in [0, 1], or null for none")
        if self.cooldown is not None and self.cooldown_steps is not None:
            raise ValueError(
                f"cooldown={self.cooldown} and cooldown_steps={self.cooldown_steps}: give one"
            )

    def num_cooldown_steps(self, steps: int) -> int:
        """Return the length of the cooldown in a run that ends at `steps`."""
        if self.cooldown_steps is not None:
            return self.cooldown_steps
        return int((self.cooldown or 0.0) * steps)

    def check(self, steps: int) -> None:
        """Raise ValueError if the cooldown does not fit behind the warm-up."""
        length = self.num_cooldown_steps(steps)
        if length > max(0, steps - self.warmup_steps):
            raise ValueError(
                f"a cooldown of {length} steps and warmup_steps={self.warmup_steps} exceed "
                f"steps={steps}; shorten one of them"
            )

    def rate(self, step: Any, steps: int) -> Any:
        """Return the float32 rate of a step (a traced scalar) in a run of `steps`."""
        import jax.numpy as jnp

        length = self.num_cooldown_steps(steps)
        rate = jnp.float32(self.learning_rate)
        if self.warmup_steps:
            rate = rate * jnp.minimum((step + 1) / self.warmup_steps, 1.0)
        if not length:
            return rate
        done = jnp.clip(step + 1 - (steps - length), 0, length) / length
        return rate * (1.0 - (jnp.sqrt(done) if self.shape == "1-sqrt" else done))


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Start from checkpoint `step` of the run in the folder `run`.

    Parameters, optimizer moments, step counter and data position are taken over, so the first step
    of the branch is step `step` (counted from 0) and it ends at `steps` like any other run.
    """

    run: str
    step: int

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run='' must be the working directory of a training run")
        if self.step < 1:
            raise ValueError(f"step={self.step} must be >= 1; leave branch out to start at 0")

    def check(self, steps: int, schedule: Any = None) -> None:
        """Raise ValueError if a run that ends at `steps` leaves nothing to train or to cool."""
        if self.step >= steps:
            raise ValueError(f"branch.step={self.step} must be below steps={steps}")
        if isinstance(schedule, Continual):
            whole = (schedule.cooldown, schedule.cooldown_steps) == (None, None)
            if whole and self.step < schedule.warmup_steps:
                raise ValueError(
                    f"branch.step={self.step} lies inside the warm-up and the whole branch would "
                    f"cool down; branch at warmup_steps={schedule.warmup_steps} or later, or set "
                    "schedule.cooldown"
                )
            length = schedule.num_cooldown_steps(steps)
            if length > steps - self.step:
                raise ValueError(
                    f"a cooldown of {length} steps does not fit between branch.step={self.step} "
                    f"and steps={steps}; branch at {steps - length} or earlier, or shorten it"
                )

    def schedule(self, schedule: Any, steps: int) -> Any:
        """Return the schedule of the branch: a `Continual` without a cooldown cools all of it."""
        if not isinstance(schedule, Continual):
            return schedule
        if schedule.cooldown is not None or schedule.cooldown_steps is not None:
            return schedule
        return replace(schedule, cooldown_steps=steps - self.step)
