# SPDX-License-Identifier: Apache-2.0
"""Time greedy generation with Hugging Face transformers, as a worker of `eval.speed`.

Runs under another Python environment and imports neither jax nor this project. To make one that
suits the comparison (PyTorch for CPU is enough):

    python3.11 -m venv transformers-env
    transformers-env/bin/pip install torch==2.13.0 transformers safetensors

    python -m eval configs/eval/speed_vs_transformers.yaml \
        transformers_python=transformers-env/bin/python

Protocol: one JSON request a line on stdin, one JSON reply a line on stdout. A request has `path`
(Hugging Face folder), `prompts` (equally long lists of ids), `new_tokens` and `cache`: "dynamic"
(the library's default), "static" (preallocated, eager) or "compiled" (static under
`torch.compile`). The reply has `seconds`, `tokens` (the new ids of every row) and `versions`.
Nothing stops early: end-of-text ids are ignored, as in the run it is compared with.
"""

import argparse
import json
import platform
import sys
import time

import torch  # type: ignore[import-not-found]
import transformers  # type: ignore[import-not-found]

CACHES = ("dynamic", "static", "compiled")


def main() -> None:
    """Answer requests until stdin ends."""
    parser = argparse.ArgumentParser(description="transformers side of the speed comparison")
    parser.add_argument("--threads", type=int, required=True, help="PyTorch intra-op threads")
    torch.set_num_threads(parser.parse_args().threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    models = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["path"] not in models:
            models[request["path"]] = load(request["path"])
        reply = generate(models[request["path"]], request)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def load(path):
    """Load a float32 model whose generation never ends early."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    config = model.generation_config
    config.eos_token_id = None
    config.pad_token_id = 0
    config.do_sample = False
    return model


def generate(model, request):
    """Generate once and return the wall time and the new tokens."""
    prompts = torch.tensor(request["prompts"])
    options = cache_options(request["cache"])
    with torch.inference_mode():
        start = time.perf_counter()
        tokens = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=request["new_tokens"],
            **options,
        )
        seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens": tokens[:, prompts.shape[1] :].tolist(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
    }


def cache_options(cache):
    """Return the arguments of `generate` that select a cache."""
    if cache not in CACHES:
        raise ValueError(f"cache={cache!r} must be one of {CACHES}")
    if cache == "dynamic":
        return {}
    if cache == "static":
        return {"cache_implementation": "static", "disable_compile": True}
    compile_config = transformers.CompileConfig(mode="default", fullgraph=False)
    compile_config._compile_all_devices = True  # auto-compilation is limited to GPUs otherwise
    return {"cache_implementation": "static", "compile_config": compile_config}


if __name__ == "__main__":
    main()
