# SPDX-License-Identifier: Apache-2.0
"""Float64 references, written as loops over the definition."""

import numpy as np

from pallas_kernels.common import MASK_VALUE


def held_positions(length: int, slots: int) -> np.ndarray:
    """Return which position every slot holds by replaying the writes; -1 for empty slots."""
    held = np.full(slots, -1)
    for position in range(length):
        held[position % slots] = position
    return held


def decode_attention(q, k, v, length, starts, limits, *, scale, softcap=None, sinks=0, tail=None):
    """Attend every row to every visible slot; arguments as `api.decode_attention` (numpy)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, rows, heads, _ = q.shape
    group = heads // k.shape[1]
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], MASK_VALUE)
    for b in range(batch):
        held = held_positions(int(length[b]), k.shape[2])
        for t in range(rows):
            seen = (held >= 0) & (held < limits[b][t])
            seen &= (held >= starts[b][t]) | (held < sinks)
            if tail is not None:
                first = int(length[b]) - rows
                for slot in np.flatnonzero(held >= first):
                    late = held[slot] >= starts[b][t] or held[slot] < sinks
                    seen[slot] = held[slot] >= 0 and tail[b][t][held[slot] - first] and late
            if not seen.any():
                continue
            for n in range(heads):
                scores = k[b, n // group, seen] @ q[b, t, n] * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights @ v[b, n // group, seen] / weights.sum()
                lse[b, t, n] = scores.max() + np.log(weights.sum())
    return out, lse
