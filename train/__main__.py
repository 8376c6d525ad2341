# SPDX-License-Identifier: Apache-2.0
"""`python -m train CONFIG [key=value ...]`: train the model that a config describes.

A config of `kind: collect` records trajectories of a diffusion model instead, to be trained on,
one of `kind: calibrate` makes what the KVQuant cache needs, one of `kind: simulate` makes weather,
and one of `kind: sweep` trains a family of models.
"""

from sqzjax.cli import Command, Program, start

PROGRAM = Program(
    name="train",
    summary="Train a model from a YAML config, or, with `kind: collect`, record trajectories of "
    "a teacher, with `kind: calibrate`, calibrate a cache, with `kind: simulate`, make weather to "
    "train on, or, with `kind: sweep`, train a family of models; interrupted runs continue "
    "exactly.",
    commands={
        "": Command(
            schema="train.config:TrainConfig",
            run="train.run:run",
            plan="train.topology_plan:run",
        ),
        "collect": Command(schema="train.collect_config:CollectConfig", run="train.collect:run"),
        "simulate": Command(
            schema="train.simulate_config:SimulateConfig", run="train.simulate:run"
        ),
        "calibrate": Command(
            schema="train.calibrate_config:CalibrateConfig", run="train.calibrate:run"
        ),
        "sweep": Command(schema="train.sweep_config:SweepConfig", run="train.sweep:run"),
    },
    example="python -m train configs/train/demo.yaml --workdir runs/demo",
    resumable=True,
)

if __name__ == "__main__":
    start(PROGRAM)
