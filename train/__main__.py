# SPDX-License-Identifier: Apache-2.0
"""`python -m train CONFIG [key=value ...]`: train the model that a config describes.

A config of `kind: collect` records trajectories of a diffusion model instead, to be trained on, and
one of `kind: calibrate` makes what the KVQuant cache needs.
"""

import sys

from sqzjax.cli import Command, Program, main

PROGRAM = Program(
    name="train",
    summary="Train a model from a YAML config, or, with `kind: collect`, record trajectories of "
    "a teacher, or, with `kind: calibrate`, calibrate a cache; interrupted runs continue exactly.",
    commands={
        "": Command(
            schema="train.config:TrainConfig",
            run="train.run:run",
            plan="train.topology_plan:run",
        ),
        "collect": Command(schema="train.collect_config:CollectConfig", run="train.collect:run"),
        "calibrate": Command(
            schema="train.calibrate_config:CalibrateConfig", run="train.calibrate:run"
        ),
    },
    example="python -m train configs/train/demo.yaml --workdir runs/demo",
    resumable=True,
)

if __name__ == "__main__":
    sys.exit(main(PROGRAM))
