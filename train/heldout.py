# SPDX-License-Identifier: Apache-2.0
"""Leave in the working folder what an evaluation needs of the data: held-out tokens, baselines.

`heldout.npz` holds `tokens` and `offsets` (document i is `tokens[offsets[i]:offsets[i + 1]]`);
`baselines.json` the cross-entropy of count-based models on them, in nats per token.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from sqzjax.io import atomic
from train.data import Dataset, bigram, unigram

TOKENS, BASELINES = "heldout.npz", "baselines.json"
_CONTENT = "data"


def write_held_out(dataset: Dataset, workdir: Path) -> None:
    """Write both files unless they are there for these data; nothing if nothing is held out."""
    stores = [part.held_out for part in dataset.parts if part.held_out.num_tokens]
    if not stores:
        return
    described = json.dumps(dataset.fingerprint, sort_keys=True).encode()
    content = hashlib.sha256(described).hexdigest()
    if _content_of(workdir) == content:
        return
    tokens = dataset.eval_tokens
    starts = np.cumsum([0, *(store.num_tokens for store in stores)])
    pieces = [store.offsets[:-1] + start for store, start in zip(stores, starts)]
    offsets = np.concatenate([*pieces, starts[-1:]]).astype(np.int64)
    with atomic.replacing(workdir / TOKENS) as path, path.open("wb") as file:
        np.savez_compressed(file, tokens=tokens, offsets=offsets)
    # Like the model, the baselines are not asked for the first token of a document.
    targets = np.ones(len(tokens), bool)
    targets[offsets[:-1][np.diff(offsets) > 0]] = False
    train = dataset.train_tokens()
    models = [f(train, tokens, dataset.vocab_size, targets=targets) for f in (unigram, bigram)]
    figures = {m.name: {"nll": m.nats_per_token, "perplexity": m.perplexity} for m in models}
    text = json.dumps({**figures, _CONTENT: content}, indent=1) + "\n"
    atomic.write_text(workdir / BASELINES, text)


def _content_of(workdir: Path) -> str | None:
    """Return the fingerprint that complete files were written for."""
    try:
        return json.loads((workdir / BASELINES).read_text())[_CONTENT]
    except (OSError, ValueError, KeyError):
        return None
