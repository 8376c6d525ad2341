# SPDX-License-Identifier: Apache-2.0
"""Every numerical tolerance of the test suite, in one table.

A test never writes a tolerance inline. Changing a number here needs a change of its own with a
reason.
"""

KERNEL_ATOL = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1e-3}
LSE_ATOL = {"float32": 1e-5, "bfloat16": 1e-3, "float16": 1e-3}
CHUNKED = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3}
SHARDED = {"float32": 1e-5, "bfloat16": 2e-2}
GOLDEN_LOGITS = 1e-4
GOLDEN_HIDDEN = 1e-4
RAGGED = 1e-5
STORY_NLL = 1e-3
ACCUMULATION_REL = 1e-6
GRADIENT_REL = 1e-3
SAMPLING_P_VALUE = 1e-3
FLOPS_REL = 0.05
MERGE = 1e-6
FOUR_DIGITS = 5e-4
"""Half a unit in the last place of a published figure with four digits."""
THREE_DIGITS = 5e-3
PROFILING_MODEL = 0.02
"""Against the published profiling model, which leaves its element-wise operators unfused."""
ROOFLINE_FACTOR = 4.0
"""Measured over predicted decode time on a calibrated CPU."""
PRINTED_TENTH = 0.05
FLOAT64_REL = 1e-12
SUMMED_LOGPROB = 2e-4
"""Sum of some tens of float32 token log-likelihoods against float64."""
# A save in the background may block this share of one training step.
SAVE_OVERHEAD = 0.05
ROLLING_LOGPROB = 1e-3
"""Sum of some hundreds of float32 token log-likelihoods against float64."""
PROBABILITY = 2e-6
"""A float32 probability or log probability against float64."""
LOSS_REL = 2e-6
"""A float32 loss summed over some tens of tokens against float64."""
EMA_REL = 1e-6
"""Some float32 steps of an exponential average against float64."""
SCHEDULE_REL = 1e-6
"""A float32 learning rate against its closed form in float64."""
SOAK_MEMORY = 0.01
SOAK_SPEED = 0.05
"""Growth of memory and loss of speed over ten thousand steps."""
PLANNED_BYTES = 0.01
"""Bytes of a program's arguments against the compiler's count, which pads small arrays."""
INTEGER_PRODUCT_REL = {"float32": 2e-6, "bfloat16": 2e-6, "float16": 2e-6}
"""Of the largest result: rows are used to their last bit, only the float32 sums are rounded, which
are of the size of the terms: where these cancel, 1.2e-6 of the largest result was seen."""
RECOMPUTED = 1e-3
"""Figures recomputed from a published model, which we know to a few digits."""
TWO_DIGITS = 0.02
"""Half a unit in the last place of a figure with two digits."""
SUMMED_STEPS = 1e-8
"""A sum of linear pieces by interpolation against adding every term."""
RESIDUAL = 3e-6
"""Float32 weights and mean embeddings of order 1 against float64."""
CALIBRATED_REL = 1e-3
"""A temperature found from float32 mean weights."""
TOP_K_REL = 0.25
"""Relative error of a mixture of 16 of 61 tokens at logits of deviation 4; of one token more."""
PUBLISHED_BYTES = 2e-4
"""Bytes of a whole cache against a closed form: lengths, and slots that fill the last tile."""
PUBLISHED_OUTLIERS = 0.06
"""GiB of a cache with 1 % outliers, ours stored otherwise, against a figure printed to a tenth."""
WINDOW_SHARE = 7e-3
"""What an exact window of 128 tokens, 16 bits against three, adds to a cache of 128K."""
HALF_STEP = 1e-2
"""Beyond half a gap between levels: 16-bit scales and offsets of elements of order 1."""
INT8_OUTPUT = 0.05
"""Attention over tokens in INT8, values of order 1, where the same tokens are read."""
FACTORS_REL = 1e-5
"""The product of the singular vectors and values of a float32 kernel against the kernel."""
REASSOCIATED = 1e-4
"""Values projected after their weighted sum against the sum of projected values."""
STORED_BYTES = 0.01
"""Bytes of a cache against the formula of its format, which leaves its lengths out."""
BINNED_REL = 1e-3
"""K-means on a histogram against all samples."""
HALF_RESIDUAL = 5e-4
"""Float16 residuals to codes of numbers of order 1."""
CLOSED_LOOP = 5e-3
"""Beyond half a step of a scale: scale and offset in 16 bits, of elements of order 1."""
SPHERE = 1e-5
"""Spherical transforms: round trips, Parseval, other libraries, of coefficients of order 1."""
SPECTRAL_MSE = 1e-6
"""A square error summed over degrees against the one integrated over the sphere, relative."""
FORECAST_REL = 1e-5
"""Float32 losses and scores of fields against float64, relative to the largest."""
NORMAL_EQUATIONS = 1e-6
"""A float64 fit of three to five constants against another algorithm, or in other units."""
ROUNDED_POINTS = 0.015
"""Coefficient of a law of published points read to five digits; it moves 1.4 % (one deviation)."""
FINITE_DIFFERENCE = 1e-5
NOISE_ESTIMATE = 0.2
"""A deviation estimated from some tens of draws."""
ENVELOPE_STEPS = 0.05
"""Best size where sizes are 12 % apart."""
GOLDEN_FIELDS_REL = 1e-5
"""Of the largest value of an emulator's output: original code in float32 against ours."""
SWIN_REL = 1e-5
"""Of the largest value: float32 in another order of sums, or float64, against float32."""
SWIN_BFLOAT16_REL = 3e-2
"""Of the largest value: some blocks in bfloat16 against float32."""
LOGITS_16_BITS = {"bfloat16": 0.12, "float16": 0.03}
"""Of the root of the mean square: logits of a small model, some through caches of 4 bits."""
SAME_DRAW_REL = 1e-6
"""The same random numbers of two programs, which may round differently."""
SAMPLED_DEVIATION = 0.1
"""Relative error of a deviation estimated from some hundreds of samples, three sigma."""
GELU = 5e-6
"""Float32 values of order 8, or their slopes, against float64."""
PACKED_TEMPERATURE = 5.1e-3
"""Half a step of a field packed as integers in steps of 0.01 K, and float32 rounding at 270 K."""
FIELD_REL = 1e-6
"""A field rounded to float32."""
DEGREES = 1e-4
"""A coordinate stored in float32."""
NORMALISED_MEAN = 1e-4
"""Mean of float32 values of order 1 that were 1e5 before their mean was subtracted."""
DENORMALISED_REL = 1e-6
"""Float32 fields normalised and back, relative to their channel's largest value."""
RECORDED = 2e-5
"""Fields of order 1 through float32 spherical harmonics, of dinosaur's constants."""
STATISTICS_REL = 1e-8
"""Statistics rounded to nine digits."""
MOMENTS_REL = 1e-9
"""A float64 deviation of order 1 around a mean of 1e4."""
NORMALISED_FIELD = 2e-5
"""Float32 fields of 250 or 1e5, normalised to order 1, against float64."""
DRY_MASS = 1e-5
"""Relative change of mean surface pressure: float32 after each correction."""
LAND_SHARE = 0.15
"""Share of land on 128 points of a coarse grid, whose shore is a curve between them."""
INTERPOLATED = 1e-5
"""Float32 columns of order 1 to 10, interpolated."""
HYPSOMETRIC = 0.02
"""Thickness of a nearly isothermal layer against its mean temperature at two levels."""
HALF_ROUNDING = 2.0**-11
"""A number rounded to float16, relative."""
SMALL_SCALES_REL = 0.15
"""Error of 8-bit codes whose scales are some ten times the least float16, against all bits."""
