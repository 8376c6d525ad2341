# SPDX-License-Identifier: Apache-2.0
"""Train a byte-level BPE tokenizer (GPT-2's pre-tokenisation, digits one by one).

Every text can be encoded, since all 256 bytes are in the vocabulary. Training is deterministic and
takes about 2 s for 3 MB of text.
"""

import logging
from collections.abc import Iterable, Iterator

from sqzjax.errors import DataError
from sqzjax.io.tokenizer import JsonTokenizer

SPECIAL = {role: f"<|{role}|>" for role in ("bos", "eos", "pad", "mask")}

_log = logging.getLogger(__name__)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    min_frequency: int = 2,
    max_characters: int = 50_000_000,
) -> JsonTokenizer:
    """Train on the first `max_characters` of the texts; ids 0-3 are bos, eos, pad and mask.

    Small texts may not hold `vocab_size` different pieces; the vocabulary is then smaller, which is
    logged.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, level])  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_first(texts, max_characters), trainer)
    if backend.get_vocab_size() < vocab_size:
        _log.warning(
            "the text holds only %d pieces, fewer than vocab_size=%d",
            backend.get_vocab_size(),
            vocab_size,
        )
    settings = {f"{role}_token": text for role, text in SPECIAL.items()}
    return JsonTokenizer(
        backend.to_str(pretty=True),
        {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, **settings},
    )


def _first(texts: Iterable[str], max_characters: int) -> Iterator[str]:
    left = max_characters
    for text in texts:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)
    if left == max_characters:
        raise DataError("no text to train a tokenizer on; the training documents are empty")
