"""Calibration of auxiliary losses against a main loss: needs jax and optax, knows nothing of RL.

`transform` holds the optax transformations, `estimators` the ways to measure c and v².
"""

from occ_jax.calibration.estimators import (
    cross_batch_statistics as cross_batch_statistics,
    log_prob_statistics as log_prob_statistics,
    released_code_coefficient as released_code_coefficient,
)
from occ_jax.calibration.transform import (
    CalibrationState as CalibrationState,
    FixedAuxiliaryState as FixedAuxiliaryState,
    Statistics as Statistics,
    calibrate_auxiliary as calibrate_auxiliary,
    fixed_auxiliary as fixed_auxiliary,
    inner_product_statistics as inner_product_statistics,
    optimal_coefficient as optimal_coefficient,
)
