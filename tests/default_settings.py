# SPDX-License-Identifier: Apache-2.0
"""Settings of the costly parametrized tests that run by default; their other settings are slow.

Most of a test's time is compilation. Of the tests in `GRIDS`, whose parameters are crossed, so many
settings run that every value of every parameter occurs; of those in `DEFAULT_SETTINGS` the settings
that meet every branch of what is tested; of those in `SLOW` none, as others meet most of the same
code. `make test-slow` runs the rest. A name that matches no test is an error (`tests/conftest.py`).
"""

SLOW: frozenset[str] = frozenset(
    {
        "eval/test_lm_harness.py::test_generation_in_request_order_with_mixed_settings",
        "eval/test_scaling.py::test_three_sizes_a_budget_fit_without_intervals",
        "pallas_kernels/test_quantized_decode_attention_mosaic_gpu.py::test_a_wrong_turn_is_noticed",
        "sqzjax/test_problems.py::test_no_prompt_is_on_both_sides",
        "sqzjax/test_xquant.py::test_sinks_stay_exact",
        "contracts/test_quantizers.py::test_vmap_agrees_with_the_whole",
        "eval/test_decode_speed.py::test_breakdown_sums_to_the_step",
        "eval/test_diffusion_scoring.py::test_the_bound_is_below_the_likelihood_of_a_true_model",
        "pallas_kernels/test_decode_attention_mosaic_tpu.py::test_any_range_of_positions",
        "pallas_kernels/test_paged_decode_attention.py::"
        "test_a_kernel_that_reads_pages_in_another_order_is_noticed",
        "pallas_kernels/test_paged_decode_attention.py::test_long_lists_are_gathered_in_chunks",
        "pallas_kernels/test_quantized_decode_attention_mosaic_gpu.py::test_a_wrong_base_is_noticed",
        "sqzjax/test_decode_span.py::test_a_mesh_maps_the_kernel_over_sequences_and_heads",
        "sqzjax/test_diffusion_requests.py::test_samples_depend_on_neither_batch_nor_capacity",
        "sqzjax/test_prompt_embeds.py::test_diffusion_from_embeddings_of_ids",
        "train/test_diffusion_objectives.py::"
        "test_the_mean_over_draws_is_the_entropy_of_a_constant_model",
        "train/test_sweep.py::test_a_damaged_trunk_is_named_with_its_remedy",
        "train/test_sweep.py::test_a_job_waits_for_the_lock_of_its_folder",
        "eval/test_decode_speed.py::test_a_combination_without_room_is_recorded",
        "eval/test_decode_speed.py::test_filled_caches_hold_the_context_and_have_room",
        "eval/test_diffusion_scoring.py::test_perplexity_is_labelled_as_a_bound",
        "eval/test_diffusion_scoring.py::test_saved_answers_outlive_other_likelihood_settings",
        "eval/test_forecast.py::test_models_with_other_units_are_compared_in_common_ones",
        "eval/test_forecast_runs.py::test_points_without_values_do_not_count",
        "eval/test_models.py::test_a_reference_model_opens_the_blocks",
        "eval/test_models.py::test_generation_does_not_depend_on_the_batch",
        "eval/test_refusals.py::test_every_report_is_replaced_as_a_whole",
        "eval/test_speed.py::test_steps_of_emulators_are_timed_on_their_own_flops",
        "faults/test_kill.py::test_kill_in_first_save_and_in_deletion",
        "faults/test_objective_faults.py::test_the_same_seed_gives_the_same_bytes",
        "faults/test_sweep_faults.py::"
        "test_a_restart_waits_for_a_job_left_behind_and_takes_its_result",
        "faults/test_sweep_faults.py::"
        "test_jobs_that_are_asked_to_stop_while_they_start_have_not_failed",
        "faults/test_train_faults.py::test_preempted_run_continues",
        "pallas_kernels/test_attention.py::test_a_traced_window_equals_a_static_one",
        "pallas_kernels/test_attention_library.py::test_splash_in_bfloat16_and_under_vmap",
        "pallas_kernels/test_cpu_bench.py::test_memory_is_that_of_the_cache",
        "pallas_kernels/test_decode_attention_bench.py::test_candidates_agree",
        "pallas_kernels/test_paged_decode_attention.py::"
        "test_benchmarks_compute_attention_and_count_what_is_read",
        "pallas_kernels/test_paged_decode_attention.py::test_vmap_over_layers",
        "pallas_kernels/test_quantized_decode_attention_bench.py::"
        "test_packed_candidates_compute_attention",
        "sqzjax/test_decode_golden.py::test_greedy_tokens_equal_the_reference",
        "sqzjax/test_diffusion.py::"
        "test_threshold_above_one_commits_one_a_step_and_zero_a_block_a_step",
        "sqzjax/test_diffusion.py::test_with_one_layer_every_reuse_is_exact",
        "sqzjax/test_evicting.py::test_probabilities_in_tiles_equal_those_at_once",
        "sqzjax/test_generate.py::test_forked_greedy_samples_are_all_the_greedy_one",
        "sqzjax/test_generate.py::test_prepared_parameters_have_the_compute_dtype",
        "sqzjax/test_generate.py::test_samples_of_one_prompt_differ_and_are_reproducible",
        "sqzjax/test_generate.py::test_the_first_sample_is_what_a_single_request_draws",
        "sqzjax/test_losa.py::test_rows_do_not_depend_on_their_batch",
        "sqzjax/test_losa_models.py::test_a_finished_block_keeps_the_keys_of_a_dense_pass",
        "sqzjax/test_models.py::test_a_policy_may_carry_a_value_from_layer_to_layer",
        "sqzjax/test_prompt_embeds.py::test_contexts_and_forks_of_embeddings",
        "sqzjax/test_prompt_embeds.py::test_penalties_count_ids_only_and_forks_start_alike",
        "sqzjax/test_prompt_embeds.py::test_reuse_treats_embeddings_like_ids",
        "sqzjax/test_swin.py::test_layouts_and_recomputation_agree",
        "sqzjax/test_xquant.py::test_a_cache_of_a_single_group_is_written",
        "sqzjax/test_xquant.py::test_mixed_values_equal_rebuilt_ones",
        "sqzjax/test_xquant_cl.py::test_a_bfloat16_accumulator_adds_its_own_rounding_only",
        "sqzjax/test_xquant_cl.py::test_codes_do_not_depend_on_how_tokens_came",
        "sqzjax/test_xquant_cl.py::"
        "test_projections_of_uncoded_latents_are_exact_in_the_closed_loop_only",
        "train/test_data_dataset.py::test_wikitext_and_gsm8k",
        "train/test_rcd.py::test_nothing_to_learn_is_a_zero_weight_and_finite",
        "train/test_run.py::test_interrupted_run_equals_an_undisturbed_one",
        "train/test_simulate.py::test_rows_go_south_and_winds_blow_as_their_stream_function_says",
        "train/test_sweep.py::test_budgets_may_be_added_at_any_place",
        "train/test_sweep.py::test_failed_jobs_hold_up_only_what_needs_them",
    }
)

GRIDS: frozenset[str] = frozenset(
    {
        "contracts/test_cache.py::test_chunked_equals_whole",
        "contracts/test_coded_cache.py::test_attends_to_the_codes_the_window_and_the_sinks",
        "contracts/test_coded_cache.py::test_codes_do_not_depend_on_how_tokens_came",
        "faults/test_objective_faults.py::test_batches_without_targets_change_nothing",
        "faults/test_objective_faults.py::test_extreme_noise_gives_finite_losses",
        "golden/test_golden.py::test_cached_logits",
        "golden/test_golden.py::test_logits_and_hidden_states",
        "pallas_kernels/test_attention.py::"
        "test_every_mask_equals_the_definition_in_value_and_gradient",
        "pallas_kernels/test_attention.py::test_any_split_of_the_keys_merges_into_the_whole",
        "pallas_kernels/test_attention.py::test_low_precision_accumulates_in_float32",
        "pallas_kernels/test_attention.py::test_memory_is_linear_in_the_length",
        "pallas_kernels/test_attention.py::test_noisy_clean_attention_equals_its_mask",
        "pallas_kernels/test_attention_library.py::test_splash_equals_the_definition_in_value_and_gradient",
        "pallas_kernels/test_int_gemv.py::test_groups_that_end_within_a_tile_of_words",
        "pallas_kernels/test_products.py::test_products_equal_float64",
        "pallas_kernels/test_int_gemv.py::test_xla_equals_float64",
        "pallas_kernels/test_quantized_decode_attention.py::"
        "test_any_range_of_positions_equals_the_definition",
        "pallas_kernels/test_quantized_decode_attention.py::test_no_more_than_a_tile_is_decoded",
        "pallas_kernels/test_quantized_decode_attention.py::test_rows_that_do_not_fill_their_words",
        "sqzjax/test_diffusion.py::test_decoding_equals_its_definition",
        "sqzjax/test_gear.py::test_the_error_is_never_above_that_of_the_backbone",
        "sqzjax/test_trajectory.py::test_equals_the_algorithm_by_hand",
        "train/test_lora.py::test_merged_equals_applied",
        "sqzjax/test_evicting.py::test_evicting_equals_a_simulation_of_every_head",
        "sqzjax/test_losses.py::test_divergence_equals_float64",
        "sqzjax/test_losses.py::test_equals_float64",
        "sqzjax/test_quest.py::test_causal_decoding_equals_its_definition",
    }
)

DEFAULT_SETTINGS: dict[str, tuple[str, ...]] = {
    "contracts/test_coded_cache.py::test_prompts_attend_to_their_own_tokens_exactly": (
        "kivi",
        "sinks_at_once",
    ),
    "contracts/test_coded_cache.py::test_rows_do_not_depend_on_their_batch": ("kivi", "static"),
    "contracts/test_decoders.py::test_lossless_decoders_equal_plain_greedy": (
        "autoregressive_window",
    ),
    "contracts/test_decoders.py::test_values_do_not_recompile": ("autoregressive",),
    "contracts/test_decoders.py::test_rows_do_not_depend_on_their_batch": ("autoregressive",),
    "contracts/test_quantizers.py::test_errors_are_at_most_half_a_gap": (
        "uniform_groups",
        "symmetric",
        "normal_float_channel",
        "float8_e4m3",
        "codebook_outliers",
        "codebook_channel",
    ),
    "contracts/test_quantizers.py::test_errors_are_at_most_half_a_gap_far_from_zero": (
        "uniform_groups",
        "normal_float_channel",
        "codebook_outliers",
    ),
    "eval/test_diffusion_scoring.py::test_few_masks_are_enumerated_exactly": ("blocks",),
    "eval/test_diffusion_scoring.py::test_samples_have_the_expectation_of_all_masks": (
        "blocks",
        "shifted",
    ),
    "eval/test_diffusion_scoring.py::test_scores_do_not_depend_on_the_batch": ("shifted",),
    "eval/test_perplexity.py::test_stories_match_published_sums": ("True",),
    "faults/test_checkpoint_damage.py::test_truncation_extension_and_deletion_of_each_file": (
        "half",
        "longer",
        "deleted",
    ),
    "pallas_kernels/test_aot.py::test_every_case_lowers": ("a100",),
    "pallas_kernels/test_cpu_bench.py::test_every_form_can_be_attended_to": (
        "int4",
        "kvquant3",
    ),
    "pallas_kernels/test_decode_attention_mosaic_tpu.py::test_equals_the_definition": (
        "wide",
        "grouped",
        "ring_tail",
        "row_tiles",
        "softcap",
        "window_sinks_ring",
    ),
    "pallas_kernels/test_int_gemv_mosaic_gpu.py::test_interpreted_kernel_equals_float64": (
        "4-2-512-64-128-float32-None",
        "8-8-192-128-32-float16-config3",
        "4-2-320-64-320-bfloat16-config4",
        "4-64-256-64-64-bfloat16-None",
        "8-33-128-64-128-bfloat16-None",
    ),
    "pallas_kernels/test_quantized_decode_attention.py::"
    "TestDecodeStep::test_caches_stay_where_they_are": ("kivi",),
    "pallas_kernels/test_paged_decode_attention.py::test_gpu_kernel_equals_the_definition": (
        "pages_of_a_tile",
        "tiles_of_a_page",
    ),
    "pallas_kernels/test_paged_decode_attention.py::test_tpu_kernel_equals_the_definition": (
        "one_row",
        "slots_last",
    ),
    "pallas_kernels/test_quantized_decode_attention_mosaic_gpu.py::test_equals_xla": (
        "int4",
        "kvquant3",
    ),
    "pallas_kernels/test_quantized_decode_attention_mosaic_tpu.py::test_equals_xla": (
        "few_groups_of_a_chunk",
        "kivi_blocks",
        "kvquant",
    ),
    "contracts/test_large_numbers.py::test_attention_over_large_numbers_is_finite": (
        "gear-float32",
        "kvquant-bfloat16",
        "kivi-bfloat16",
    ),
    "eval/test_plan.py::test_what_does_not_fit_the_chips_is_a_config_error": (
        "change0-batch_size=9",
    ),
    "sqzjax/test_rings.py::test_calls_are_exact_up_to_the_limit_and_refused_beyond": ("dense",),
    "sqzjax/test_rings.py::test_first_tokens_that_fit_are_taken_where_positions_are_known": (
        "dense",
    ),
    "sqzjax/test_swin.py::test_parameters": ("region",),
    "sqzjax/test_remat.py::test_unrolled_layers_are_recomputed": ("decoder",),
    "sqzjax/test_diffusion.py::test_recomputing_everything_changes_no_token": ("policy3-shifted",),
    "sqzjax/test_diffusion.py::test_the_exact_cache_changes_no_token": (
        "shifted_blocks-policy2-<lambda>",
    ),
    "sqzjax/test_kvquant.py::test_each_step_of_the_method_helps": ("3",),
    "eval/test_scoring.py::test_dense_cache_scores_like_the_plain_forward": ("7-True",),
    "train/test_calibrate.py::test_gradients_are_those_of_the_loss": ("True",),
    "faults/test_train_faults.py::test_non_finite_step_changes_nothing": (
        "gradient-1",
        "loss-2",
    ),
    "sqzjax/test_losa_models.py::test_a_full_budget_changes_no_token": ("commit1-1",),
    "sqzjax/test_losa.py::test_all_tokens_active_and_a_full_budget_equal_dense_attention": ("4",),
    "sqzjax/test_losa.py::test_every_step_equals_its_definition": ("last",),
    "sqzjax/test_mustafar.py::test_attention_is_that_of_the_pruned_tokens": ("0.5",),
    "faults/test_objective_faults.py::test_a_parameter_that_is_not_finite_rejects_the_step": (
        "rcd",
    ),
    "faults/test_objective_faults.py::test_accumulation_changes_no_loss": ("rcd",),
    "sqzjax/test_diffusion_contexts.py::test_residual_decoding_equals_its_definition": (
        "policy0-context0",
        "policy2-context2",
    ),
    "sqzjax/test_flops.py::test_decode_flops_and_bytes_match_xla_and_arrays": (
        "gqa-1",
        "biased_qk_norm-4",
    ),
    "sqzjax/test_swin_sharded.py::test_a_step_equals_one_device_and_shifts_move_edges_only": (
        "both",
    ),
    "train/test_optim.py::test_every_optimizer_learns": ("optimizer4-0.01",),
    "sqzjax/test_diffusion.py::test_rows_do_not_depend_on_their_batch": ("shifted-policy4-None",),
    "sqzjax/test_gear.py::test_attention_equals_that_over_restored_blocks": ("64-0.0",),
    "sqzjax/test_models.py::test_chunked_prefill_equals_whole": ("False-block_causal",),
    "sqzjax/test_models.py::test_remat_changes_memory_not_gradients": ("True-full",),
    "sqzjax/test_models.py::test_stacked_and_unrolled_layouts_agree": ("mixed_windows",),
    "sqzjax/test_regimes.py::test_operations_of_diffusion_steps_match_xla": ("block_cached",),
    "sqzjax/test_sampling.py::test_draws_follow_the_distribution": (
        "700-top_p",
        "11-plain",
        "11-top_k",
        "11-min_p",
    ),
    "sqzjax/test_sharding.py::test_cached_decode_equals_one_device": ("grouped-tensor",),
    "sqzjax/test_sharding.py::test_train_step_equals_one_device": ("grouped-mixed",),
    "sqzjax/test_xquant.py::test_attends_to_what_the_codes_and_the_window_stand_for": (
        "input-False",
        "latent-True",
    ),
    "sqzjax/test_xquant.py::test_codes_do_not_depend_on_how_tokens_came": ("latent",),
    "sqzjax/test_xquant.py::test_uncoded_storage_equals_an_ordinary_cache_at_every_layer": (
        "groups_of_8-auto",
    ),
    "sqzjax/test_xquant_cl.py::test_uncoded_storage_equals_an_ordinary_cache_at_every_layer": (
        "heads-auto",
    ),
    "train/test_cdlm.py::test_the_loss_equals_its_definition": ("False",),
    "train/test_cdlm.py::test_training_sees_what_cached_decoding_sees": ("False",),
    "train/test_diffusion_objectives.py::test_the_loss_equals_its_definition": (
        "token-False",
        "sequence-True",
        "batch-True",
    ),
    "train/test_diffusion_objectives.py::test_what_is_trained_is_what_decoding_sees": (
        "True-True",
    ),
    "train/test_diffusion_objectives.py::test_a_complementary_pair_weighs_every_token_once": (
        "token",
    ),
    "train/test_rcd.py::test_loss_and_gradients_equal_the_definition": ("whole",),
    "train/test_rcd.py::test_without_weight_it_is_plain_diffusion_bit_for_bit": ("shifted",),
    "train/test_topology_plan.py::test_the_compiled_step_is_that_of_the_run": ("None",),
    "eval/test_problems_task.py::test_a_diffusion_decoder_reports_its_passes": ("4",),
    "eval/test_refusals.py::test_a_workdir_that_cannot_be_one_is_refused_in_one_line": (
        "configs/eval/arm_vs_dlm.yaml",
    ),
    "pallas_kernels/test_decode_attention_mosaic_tpu.py::"
    "test_equals_the_definition_in_simulated_memory": ("window_sinks_ring",),
    "sqzjax/test_diffusion_requests.py::"
    "test_drawn_positions_depend_on_the_seed_and_not_on_the_batch": ("policy0",),
    "sqzjax/test_prompt_embeds.py::test_rows_do_not_depend_on_their_batch": (
        "shifted_blocks-options1",
    ),
}
