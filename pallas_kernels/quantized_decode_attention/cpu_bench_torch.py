# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side of `cpu_bench`: attention of one token to float32 keys and values.

Runs under another Python environment, whose only package of interest is PyTorch; imports neither
jax nor this project. Each line on stdin names a candidate; the answer is the seconds of one call.
"""

import argparse
import sys
import time

import torch  # type: ignore[import-not-found]


def main() -> None:
    """Answer until stdin ends."""
    parser = argparse.ArgumentParser()
    for name in ("slots", "threads", "heads", "kv-heads", "width"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heads, shared, width = options.heads, options.kv_heads, options.width
    q = torch.randn(1, heads, 1, width)
    k, v = (torch.randn(1, shared, options.slots, width) for _ in range(2))

    def torch_sdpa():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def torch_matmul():
        scores = q.view(1, shared, heads // shared, width) @ k.transpose(-1, -2)
        return torch.softmax(scores / width**0.5, -1) @ v

    functions = {"torch_sdpa": torch_sdpa, "torch_matmul": torch_matmul}
    with torch.inference_mode():
        for function in functions.values():
            function()
        for line in sys.stdin:
            answer = torch.__version__
            if line.strip() in functions:
                start = time.perf_counter()
                functions[line.strip()]()
                answer = time.perf_counter() - start
            sys.stdout.write(f"{answer}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
