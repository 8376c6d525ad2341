# SPDX-License-Identifier: Apache-2.0
"""Settings of the costly parametrized tests that run by default; their other settings are slow.

Most of a test's time is compilation, and these settings meet every branch of what is tested.
`make test-slow` runs the rest. A name that matches no test is an error (`tests/conftest.py`).
"""

DEFAULT_SETTINGS: dict[str, tuple[str, ...]] = {
    "faults/test_objective_faults.py::test_a_parameter_that_is_not_finite_rejects_the_step": (
        "rcd",
    ),
    "faults/test_objective_faults.py::test_accumulation_changes_no_loss": ("rcd", "cdlm"),
    "faults/test_objective_faults.py::test_the_same_seed_gives_the_same_bytes": ("rcd", "cdlm"),
    "sqzjax/test_diffusion.py::test_rows_do_not_depend_on_their_batch": (
        "block_causal-policy1",
        "bidirectional-policy4",
        "shifted-policy5",
    ),
    "sqzjax/test_diffusion.py::test_with_one_layer_every_reuse_is_exact": (
        "policy0-True",
        "policy4-False",
        "policy5-True",
    ),
    "sqzjax/test_evicting.py::test_a_full_budget_changes_no_token_and_a_small_one_does": ("h2o",),
    "sqzjax/test_gear.py::test_attention_equals_that_over_restored_blocks": ("64-0.0",),
    "sqzjax/test_losa.py::test_counts_of_all_layers_are_reported": ("True",),
    "sqzjax/test_models.py::test_chunked_prefill_equals_whole": (
        "True-window",
        "False-mixed_windows",
        "False-block_causal",
    ),
    "sqzjax/test_models.py::test_remat_changes_memory_not_gradients": ("True-full", "False-dots"),
    "sqzjax/test_models.py::test_stacked_and_unrolled_layouts_agree": (
        "mixed_windows",
        "qk_norm_head_dim",
        "biases_tied",
    ),
    "sqzjax/test_quantized_sharded.py::"
    "test_a_model_that_decodes_through_codes_on_a_mesh_equals_one_device": ("kivi",),
    "sqzjax/test_quest.py::test_a_full_budget_changes_no_token_and_a_small_one_does": (
        "block_causal",
    ),
    "sqzjax/test_regimes.py::test_operations_of_diffusion_steps_match_xla": ("block_cached",),
    "sqzjax/test_sampling.py::test_draws_follow_the_distribution": (
        "700-top_p",
        "11-plain",
        "11-top_k",
        "11-min_p",
    ),
    "sqzjax/test_sharding.py::test_cached_decode_equals_one_device": ("grouped-tensor",),
    "sqzjax/test_sharding.py::test_train_step_equals_one_device": (
        "grouped-mixed",
        "tied-tensor",
    ),
    "sqzjax/test_xquant.py::test_attends_to_what_the_codes_and_the_window_stand_for": (
        "input-False",
        "latent-True",
    ),
    "sqzjax/test_xquant.py::test_codes_do_not_depend_on_how_tokens_came": ("latent",),
    "sqzjax/test_xquant.py::test_mixed_values_equal_rebuilt_ones": ("latent-1-False",),
    "sqzjax/test_xquant.py::test_uncoded_storage_equals_an_ordinary_cache_at_every_layer": (
        "groups_of_8-auto",
    ),
    "sqzjax/test_xquant_cl.py::test_attention_reads_the_reconstruction_and_the_window": ("latent",),
    "sqzjax/test_xquant_cl.py::test_uncoded_storage_equals_an_ordinary_cache_at_every_layer": (
        "heads-auto",
    ),
    "train/test_cdlm.py::test_the_loss_equals_its_definition": ("False",),
    "train/test_cdlm.py::test_training_sees_what_cached_decoding_sees": ("False",),
    "train/test_diffusion_objectives.py::test_what_is_trained_is_what_decoding_sees": (
        "True-True",
    ),
    "train/test_rcd.py::test_loss_and_gradients_equal_the_definition": ("whole",),
    "train/test_rcd.py::test_only_masked_positions_of_the_noisy_text_change": ("shifted",),
    "train/test_rcd.py::test_without_weight_it_is_plain_diffusion_bit_for_bit": ("shifted",),
    "train/test_topology_plan.py::test_the_compiled_step_is_that_of_the_run": ("None",),
}
