# SPDX-License-Identifier: Apache-2.0
"""Read answers from text and compare them; intervals for the share that is right."""

import math
import re
from decimal import Decimal, InvalidOperation

from eval.config import Extraction

# Digits with or without thousands commas, then an optional fraction; or a bare fraction (.5).
_NUMBER = re.compile(r"(-?)[$£€]?\s?(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)")


def extract(text: str, how: Extraction) -> str | None:
    """Return the normalised answer in `text`, None if there is none."""
    if how.kind == "numeric":
        return _number(text, how.after)
    if how.kind == "regex":
        found = list(re.finditer(how.pattern, text))
        if not found:
            return None
        text = found[-1][1] if found[-1].re.groups else found[-1][0]
        if text is None:
            return None
    text = " ".join(text.split())
    return text if how.case_sensitive else text.lower()


def _number(text: str, after: str) -> str | None:
    """Return the first number behind the last `after`, else the last number of the text."""
    if after and after in text:
        matches = list(_NUMBER.finditer(text.rsplit(after, 1)[1]))[:1]
    else:
        matches = list(_NUMBER.finditer(text))[-1:]
    if not matches:
        return None
    sign = matches[0][1]
    start = matches[0].start()
    # "10-5" is a difference, not the number -5.
    if sign and start and matches[0].string[start - 1].isalnum():
        sign = ""
    return canonical(sign + matches[0][2])


def canonical(number: str) -> str:
    """Write equal numbers alike: no commas, no trailing zeros (`1,080.50` becomes `1080.5`)."""
    try:
        value = Decimal(number.replace(",", ""))
    except InvalidOperation as error:
        raise ValueError(f"{number!r} is not a number") from error
    text = format(value, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval (95 % by default) of a share; (0, 1) without trials."""
    if not total:
        return 0.0, 1.0
    share = right / total
    scale = 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)
