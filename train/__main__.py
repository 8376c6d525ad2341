# SPDX-License-Identifier: Apache-2.0
"""`python -m train CONFIG [key=value ...]`: train the model that a config describes."""

import sys

from sqzjax.cli import Command, Program, main

PROGRAM = Program(
    name="train",
    summary="Train a model from a YAML config; interrupted runs continue exactly.",
    commands={"": Command(schema="train.config:TrainConfig", run="train.run:run")},
    example="python -m train configs/train/demo.yaml --workdir runs/demo",
    resumable=True,
)

if __name__ == "__main__":
    sys.exit(main(PROGRAM))
