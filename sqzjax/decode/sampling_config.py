# SPDX-License-Identifier: Apache-2.0
"""What a generation request may ask for (`SamplingConfig`), under Hugging Face's names.

No jax here, so that a configuration file can be checked without paying for its import.
"""

import math
from dataclasses import dataclass
from typing import Any

from sqzjax.errors import RequestError

_MAX_SEED = 2**32 - 1

Real = float | int


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to choose tokens and when to stop.

    Sampling: `temperature` 0 is greedy (ties go to the lowest id). `do_sample` None means sample
    if the temperature is positive; `do_sample=True` alone samples at temperature 1, `False` is
    greedy whatever else is set. `top_k` 0, `top_p` 1, `min_p` 0 and `repetition_penalty` 1 switch
    those filters off (Hugging Face's own default of `top_k=50` is not copied).

    Stopping: `eos_token_id` None takes the model's, `stop_token_ids` come on top of them, and
    `ignore_eos` drops the end-of-sequence ids. `max_new_tokens=0` is legal and yields nothing.
    `stop_strings` need a tokenizer.

    `seed`: the sample drawn for a row depends on the seed, the row's id, the number of the sample
    and the position, never on the rest of the batch. `logprobs` returns each chosen token's log
    probability under the raw model distribution (no penalty, temperature or filter: vLLM's
    default), normalised over the real vocabulary; of a diffusion model, that of the step which
    filled the token in.
    """

    max_new_tokens: int = 128
    temperature: Real | None = None
    do_sample: bool | None = None
    top_k: int = 0
    top_p: Real = 1.0
    min_p: Real = 0.0
    repetition_penalty: Real = 1.0
    eos_token_id: int | tuple[int, ...] | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False
    pad_token_id: int | None = None
    seed: int = 0
    num_return_sequences: int = 1
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name in ("stop_token_ids", "stop_strings"):
            object.__setattr__(self, name, _sequence(name, getattr(self, name)))
        if isinstance(self.eos_token_id, list | tuple):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        _check_integers(self)
        _check_reals(self)
        for name in ("ignore_eos", "logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}={getattr(self, name)!r} must be true or false")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise RequestError(
                    f"stop_strings has {text!r}; every entry must be a non-empty string"
                )
        if self.do_sample not in (None, True, False):
            raise RequestError(f"do_sample={self.do_sample!r} must be true, false or null")
        if self.do_sample and self.temperature == 0:
            raise RequestError(
                "do_sample=True needs temperature > 0, not 0; drop one of them (temperature=0 is "
                "greedy)"
            )

    @property
    def effective_temperature(self) -> float:
        """Temperature that the sampler uses; 0 where decoding is greedy."""
        if self.do_sample is False:
            return 0.0
        if self.temperature is None:
            return 1.0 if self.do_sample else 0.0
        return float(self.temperature)

    def stop_ids(self, model_eos: tuple[int, ...]) -> tuple[int, ...]:
        """Return the ids that end a row, given those of the model."""
        eos = model_eos if self.eos_token_id is None else self.eos_token_id
        eos = (eos,) if isinstance(eos, int) else eos
        return tuple(dict.fromkeys((() if self.ignore_eos else eos) + self.stop_token_ids))


def is_integer(value: Any) -> bool:
    """Whether `value` is a whole number by type; True and 3.0 are not."""
    return not isinstance(value, bool) and hasattr(value, "__index__")


def _sequence(name: str, value: Any) -> tuple:
    if not isinstance(value, list | tuple):
        raise RequestError(f"{name}={value!r} must be a list")
    return tuple(value)


def _check_integers(config: SamplingConfig) -> None:
    limits = {
        "max_new_tokens": (0, 2**31 - 1),
        "top_k": (0, 2**31 - 1),
        "seed": (0, _MAX_SEED),
        "num_return_sequences": (1, 2**16),
    }
    for name, (low, high) in limits.items():
        value = getattr(config, name)
        if not is_integer(value) or not low <= value <= high:
            raise RequestError(f"{name}={value!r} must be an integer in [{low}, {high}]")
    eos = config.eos_token_id
    ids = {"eos_token_id": eos if isinstance(eos, tuple) else (eos,)}
    ids |= {
        "stop_token_ids": config.stop_token_ids,
        "pad_token_id": (config.pad_token_id,),
    }
    for name, values in ids.items():
        for value in values:
            if value is not None and (not is_integer(value) or value < 0):
                raise RequestError(f"{name} has {value!r}; it must be a token id >= 0")


def _check_reals(config: SamplingConfig) -> None:
    rules = {
        "temperature": (0.0, math.inf, True, "0 is greedy"),
        "top_p": (
            0.0,
            1.0,
            False,
            "1 keeps everything; for the best token use temperature=0",
        ),
        "min_p": (0.0, 1.0, True, "0 keeps everything"),
        "repetition_penalty": (0.0, math.inf, False, "1 changes nothing"),
    }
    for name, (low, high, closed, hint) in rules.items():
        value = getattr(config, name)
        if name == "temperature" and value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not low <= value <= high:
            interval = f"{'[' if closed else '('}{low:g}, {high:g}]"
            raise RequestError(f"{name}={value!r} must be a finite number in {interval}; {hint}")
        if value == low and not closed:
            raise RequestError(f"{name}={value!r} must be greater than {low:g}; {hint}")
