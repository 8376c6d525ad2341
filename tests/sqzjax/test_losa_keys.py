# SPDX-License-Identifier: Apache-2.0
"""LoSA leaves the keys and values of finished blocks as dense attention would."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from sqzjax.decode import Diffusion, Generator, SamplingConfig, requests
from sqzjax.decode.base import Run
from sqzjax.decode.reuse import Exact
from sqzjax.kvcache import Dense
from tests.sqzjax.test_losa import FULL, PROMPTS, TOLERANCE, block_model


def _decoded(cache):
    """The state of a whole decoding, as the decoder leaves it."""
    model, params = block_model()
    generator = Generator(model, params, decoder=Diffusion(model=model, reuse=Exact(), cache=cache))
    sampling = SamplingConfig(max_new_tokens=18, temperature=0, ignore_eos=True)
    checked = requests.check(PROMPTS, sampling, generator.config, generator.limits)
    padded = requests.pad(checked, generator.config, generator.limits)
    run = Run(generator.decoder, generator.params, padded)
    run.advance()
    return run.state


def test_a_finished_block_keeps_the_keys_of_a_dense_pass():
    """However few pages its denoising steps have read: the pass that stays begins anew."""
    model, params = block_model()
    state = _decoded(replace(FULL, budget=8, active_tokens=1))
    width = state.canvas.shape[1]
    positions = jnp.broadcast_to(jnp.arange(width), state.canvas.shape)
    finished = np.asarray(positions < state.start[:, None])
    assert (finished.sum(axis=1) > [len(prompt) for prompt in PROMPTS]).all()

    @jax.jit
    def dense(ids):
        caches = model.init_caches(Dense(), batch=len(PROMPTS), capacity=width, max_new=width)
        return model.forward(params, ids, positions=positions, caches=caches).caches

    expected = dense(state.canvas).states
    for layer, (found, whole) in enumerate(zip(state.caches.states, expected)):
        for name in ("k", "v"):
            held, wanted = (
                np.moveaxis(np.asarray(getattr(tokens, name))[:, :, :width], 2, 1)[finished]
                for tokens in (found.tokens, whole)
            )
            np.testing.assert_allclose(
                held, wanted, atol=TOLERANCE, rtol=TOLERANCE, err_msg=f"{layer} {name}"
            )
