"""Calibration of auxiliary losses against a main loss: needs jax and optax, knows nothing of RL.

`transform` holds the optax transformations, `estimators` the ways to measure c and v².
"""

from occ_jax.calibration.estimators import (
    cross_batch_statistics,
    log_prob_statistics,
    released_code_coefficient,
)
from occ_jax.calibration.transform import (
    CalibrationState,
    FixedAuxiliaryState,
    Statistics,
    calibrate_auxiliary,
    fixed_auxiliary,
    inner_product_statistics,
    optimal_coefficient,
)

__all__ = [
    "CalibrationState",
    "FixedAuxiliaryState",
    "Statistics",
    "calibrate_auxiliary",
    "cross_batch_statistics",
    "fixed_auxiliary",
    "inner_product_statistics",
    "log_prob_statistics",
    "optimal_coefficient",
    "released_code_coefficient",
]
