# SPDX-License-Identifier: Apache-2.0
"""Where a model of a training run comes from. Nothing here imports jax."""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from sqzjax.models.config import ModelConfig
from sqzjax.models.swin_config import SwinConfig


@dataclass(frozen=True, kw_only=True)
class Adjust:
    """Fields of the architecture to set to another value than the named model's; null keeps it.

    Conversions need them: a block-diffusion student is a causal model with
    `mask: block_causal`, a `block_size` and a `mask_token`, and with `shift_logits: true` if
    every row is to go on predicting the token after it. A larger `rope_theta` turns slower, so
    that a model trained on short texts begins long ones from what it knows.
    """

    mask: Literal["causal", "bidirectional", "block_causal"] | None = None
    block_size: int | None = None
    mask_token: int | None = None
    shift_logits: bool | None = None
    max_positions: int | None = None
    sliding_window: int | None = None
    rope_theta: float | None = None

    def apply(self, config: ModelConfig) -> ModelConfig:
        """Return `config` with the adjusted fields."""
        names = ("mask", "block_size", "shift_logits", "max_positions", "sliding_window")
        fields: dict[str, Any] = {
            name: value for name in names if (value := getattr(self, name)) is not None
        }
        if self.mask_token is not None:
            fields["tokens"] = replace(config.tokens, mask=self.mask_token)
        if self.rope_theta is not None:
            fields["rope"] = replace(config.rope, theta=self.rope_theta)
        return replace(config, **fields)


def setting(adjusted: str, value: object = "...", own: str = "") -> str:
    """Return the keys of a run's configuration that set a field, for advice in messages."""
    return f"model.adjust.{adjusted}: {value} (kind: custom: model.config.{own or adjusted})"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named size of `sqzjax.models.sizes`, with fresh parameters.

    `vocab_size` replaces the vocabulary (and resets padded embedding rows and special tokens).
    """

    family: ClassVar = "text"
    kind: Literal["preset"] = "preset"
    name: str
    vocab_size: int | None = None
    adjust: Adjust = Adjust()

    def resolve(self) -> ModelConfig:
        """Return the architecture; ValueError for an unknown name."""
        import difflib

        from sqzjax.models.config import SpecialTokens
        from sqzjax.models.sizes import SIZES

        if self.name not in SIZES:
            close = difflib.get_close_matches(self.name, SIZES, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"name={self.name!r} is no preset; {hint}presets are {sorted(SIZES)}")
        config = SIZES[self.name]
        if self.vocab_size is not None:
            config = replace(
                config, vocab_size=self.vocab_size, embedding_size=0, tokens=SpecialTokens()
            )
        return self.adjust.apply(config)


@dataclass(frozen=True, kw_only=True)
class Custom:
    """An architecture spelled out, with fresh parameters."""

    family: ClassVar = "text"
    kind: Literal["custom"] = "custom"
    config: ModelConfig

    def resolve(self) -> ModelConfig:
        """Return the architecture."""
        return self.config


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A Hugging Face checkpoint folder: its architecture and its weights."""

    family: ClassVar = "text"
    kind: Literal["hf"] = "hf"
    path: str
    adjust: Adjust = Adjust()

    def resolve(self) -> ModelConfig:
        """Read the folder's `config.json`."""
        from sqzjax.io import hf

        return self.adjust.apply(hf.read_config(self.path))


@dataclass(frozen=True, kw_only=True)
class Swin:
    """A Swin weather emulator; `path`, if any, is a folder with its weights."""

    family: ClassVar = "fields"
    kind: Literal["swin"] = "swin"
    config: SwinConfig
    path: str = ""

    def resolve(self) -> SwinConfig:
        """Return the architecture; ConfigError if the folder of weights has another."""
        if self.path:
            self._check_folder()
        return self.config

    def _check_folder(self) -> None:
        from sqzjax.errors import ConfigError
        from sqzjax.io import swin

        stored, told = swin.read_config(self.path).spelled_out, self.config.spelled_out
        problems = [
            f"model.config.{field.name}={getattr(told, field.name)!r}, and {self.path} has "
            f"{getattr(stored, field.name)!r}; set what it has"
            for field in fields(told)
            if getattr(told, field.name) != getattr(stored, field.name)
        ]
        if problems:
            raise ConfigError(problems)


ModelSource = Preset | Custom | Pretrained
"""Language models."""

AnyModel = ModelSource | Swin
