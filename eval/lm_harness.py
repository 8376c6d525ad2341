# SPDX-License-Identifier: Apache-2.0
"""Run lm-evaluation-harness tasks on our models (extra `eval`).

`register()` makes `--model sqzjax --model_args pretrained=FOLDER,cache=dense,batch_size=8` known to
lm-eval, and `run` evaluates tasks from a configuration. The logic lives in plain functions that
need no lm-eval. Long contexts lose their oldest tokens, as with lm-eval's own models.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from eval.config import LmEval, ModelEntry
from eval.models import LoadedModel, load
from eval.perplexity import windows
from eval.scoring import Request
from sqzjax import config as configs
from sqzjax.decode import SamplingConfig
from sqzjax.errors import ConfigError, RequestError
from sqzjax.io.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
_IGNORED_GENERATION_KEYS = frozenset({"do_sample", "until", "max_gen_toks"})
DEFAULT_NEW_TOKENS = 256


def prefix_token(tokenizer: Tokenizer) -> int:
    """Return the token that begins a text without context: BOS, else EOS."""
    for token in (tokenizer.bos_id, tokenizer.eos_id):
        if token is not None:
            return token
    raise RequestError("the tokenizer has neither BOS nor EOS; nothing can precede the first token")


def encode(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    """Encode a prompt; the output of a chat template brings its special tokens as text."""
    return tokenizer.encode(text, add_bos=False if chat else None, parse_special=chat)


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, *, chat: bool = False
) -> Request:
    """Split a text into context and target tokens where lm-eval does.

    Space at the end of the context belongs to the continuation. Both are encoded together, so that
    a word is not torn at the border; the context is never empty.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        return Request([prefix_token(tokenizer)], tokenizer.encode(continuation))
    head = encode(tokenizer, stripped, chat)
    whole = encode(tokenizer, stripped + continuation, chat)
    return Request(head, whole[len(head) :])


def loglikelihood(
    model: LoadedModel, pairs: Sequence[tuple[str, str]], *, chat: bool = False
) -> list[tuple[float, bool]]:
    """Return (log-likelihood, is greedy) of each continuation, in request order."""
    requests = [encode_pair(model.tokenizer, *pair, chat=chat) for pair in pairs]
    scores = model.scorer(truncate="left").score(requests)
    return [(score.logprob, score.is_greedy) for score in scores]


def loglikelihood_rolling(model: LoadedModel, texts: Sequence[str]) -> list[float]:
    """Return the log-likelihood of each whole text, every token scored once."""
    scorer = model.scorer()
    prefix = prefix_token(model.tokenizer)
    pieces = [
        windows([prefix, *model.tokenizer.encode(text)], scorer.limit, scorer.limit)
        for text in texts
    ]
    scores = iter(scorer.score([request for piece in pieces for request in piece]))
    return [sum((next(scores).logprob for _ in piece), 0.0) for piece in pieces]


def generate_until(
    model: LoadedModel, requests: Sequence[tuple[str, dict[str, Any]]], *, chat: bool = False
) -> list[str]:
    """Return the continuation of each context, in request order.

    The prompts run longest first, whatever their settings: sampling settings are data, not
    programs. `chat`: contexts come from a chat template, with special tokens spelled out.
    """
    settings = [sampling(keys) for _, keys in requests]
    prompts = []
    for (text, _), wanted in zip(requests, settings, strict=True):
        ids = encode(model.tokenizer, text, chat)
        room = model.limit - wanted.max_new_tokens
        if room < 1:
            raise RequestError(
                f"max_gen_toks={wanted.max_new_tokens} leaves no room for a prompt within "
                f"{model.limit} tokens; lower it in the task or with gen_kwargs"
            )
        prompts.append((ids or [prefix_token(model.tokenizer)])[-room:])
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts = model.generate([prompts[i] for i in order], [settings[i] for i in order], row_ids=order)
    results = [""] * len(requests)
    for index, text in zip(order, texts, strict=True):
        results[index] = text
    return results


def sampling(keys: dict[str, Any]) -> SamplingConfig:
    """Translate lm-eval's generation keywords; unknown ones are an error, not ignored."""
    until = keys.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    known = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"}
    unknown = sorted(keys.keys() - known - _IGNORED_GENERATION_KEYS - {"max_new_tokens"})
    if unknown:
        raise RequestError(
            f"generation keywords {unknown} are not supported; known: {sorted(known)}"
        )
    budget = keys.get("max_gen_toks", keys.get("max_new_tokens", DEFAULT_NEW_TOKENS))
    sampled = keys.get("do_sample", keys.get("temperature", 0) > 0)
    options = {name: keys[name] for name in known & keys.keys()}
    if not sampled:
        options["temperature"] = 0.0
    elif not options.get("temperature"):
        options["temperature"] = 1.0
    stops = tuple(dict.fromkeys(text for text in until if text))
    return SamplingConfig(max_new_tokens=int(budget), stop_strings=stops, **options)


def from_keywords(pretrained: str, **keywords: Any) -> LoadedModel:
    """Load a model from lm-eval's `model_args`.

    Known: tokenizer, dtype, weights, step, batch_size, max_length, prefill_chunk, cache (the kind
    of a cache policy); every other keyword is a setting of that cache.
    """
    # What lm-eval adds of its own.
    for name in ("device", "max_batch_size"):
        keywords.pop(name, None)
    keywords = {name: value for name, value in keywords.items() if value is not None}
    entry: dict[str, Any] = {"path": pretrained}
    for name in ("tokenizer", "dtype", "weights", "step"):
        if name in keywords:
            entry[name] = keywords.pop(name)
    numbers = {}
    for name in ("batch_size", "max_length", "prefill_chunk"):
        if name in keywords:
            numbers[name] = _integer(name, keywords.pop(name))
    kind = keywords.pop("cache", None)
    if keywords and not kind:
        raise ConfigError(f"unknown model_args {sorted(keywords)}; cache settings need cache=KIND")
    if kind:
        entry["cache"] = {"kind": kind, **keywords}
    return load(configs.load(ModelEntry, entry), **numbers)


def _integer(name: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f"{name}={value!r} must be a number; 'auto' is not supported") from error


@cache
def adapter() -> type:
    """Return the `lm_eval.api.model.TemplateLM` subclass, registered as `sqzjax`."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ConfigError(
            f"lm-eval is not installed ({error}); install the extra 'eval'"
        ) from error

    class SqzjaxLM(TemplateLM):
        """lm-eval's view of a `LoadedModel`."""

        def __init__(self, pretrained: str | LoadedModel, **keywords: Any):
            super().__init__()
            loaded = isinstance(pretrained, LoadedModel)
            self.loaded = pretrained if loaded else from_keywords(pretrained, **keywords)
            self._chat = False

        @property
        def eot_token_id(self) -> int:
            return prefix_token(self.loaded.tokenizer)

        @property
        def tokenizer_name(self) -> str:
            return f"sqzjax-{self.loaded.tokenizer.fingerprint[:16]}"

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: Any
        ) -> list[int]:
            return self.loaded.tokenizer.encode(string, add_bos=add_special_tokens)

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
            scorer = self.loaded.scorer(truncate="left")
            scores = scorer.score([Request(context, target) for _, context, target in requests])
            return [(score.logprob, score.is_greedy) for score in scores]

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            pairs = [request.args for request in requests]
            return loglikelihood(self.loaded, pairs, chat=self._chat)

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            return loglikelihood_rolling(self.loaded, [request.args[0] for request in requests])

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            pairs = [request.args for request in requests]
            return generate_until(self.loaded, pairs, chat=self._chat)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            self._chat = bool(chat_template)
            return self.tokenizer_name if chat_template else None

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            self._chat = True
            return self.loaded.tokenizer.apply_chat_template(
                chat_history, add_generation_prompt=add_generation_prompt
            )

    return register_model("sqzjax")(SqzjaxLM)


def register() -> None:
    """Make the model name `sqzjax` known to lm-eval; harmless to repeat."""
    adapter()


def run(
    task: LmEval,
    model: LoadedModel,
    *,
    seed: int,
    evaluate: Callable[..., dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Evaluate lm-eval tasks and return their metrics and versions."""
    lm = adapter()(model)
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=task.include_path or None)
    out = (evaluate or lm_eval.simple_evaluate)(
        model=lm,
        tasks=list(task.tasks),
        num_fewshot=task.num_fewshot,
        limit=task.limit or None,
        task_manager=manager,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        bootstrap_iters=1000,
        log_samples=False,
    )
    if out is None:
        raise RequestError("lm-eval returned no results")
    return {
        "metrics": {name: _plain(values) for name, values in out["results"].items()},
        "num_fewshot": out.get("n-shot", {}),
        "samples": out.get("n-samples", {}),
        "task_versions": out.get("versions", {}),
    }


def _plain(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return each metric's value and standard error; a filter's name follows in brackets.

    lm-eval spells them `exact_match,strict-match` and `exact_match_stderr,strict-match`.
    """
    kept = {}
    for key, value in values.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filter_name}")
        name = metric if filter_name == "none" else f"{metric} ({filter_name})"
        kept[name] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) else None,
        }
    return kept
