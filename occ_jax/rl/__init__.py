"""Reinforcement learning from verifiable rewards: advantages, losses, updates."""

from occ_jax.rl.advantages import group_advantages, rloo_advantages
from occ_jax.rl.losses import (
    AGGREGATIONS,
    Aggregation,
    Loss,
    aggregate,
    aggregation_denominator,
    cispo_loss,
    clipped_policy_loss,
    gspo_loss,
    kl_penalty,
    mean,
    negative_log_likelihood,
    rollout_correction,
)

__all__ = [
    "AGGREGATIONS",
    "Aggregation",
    "Loss",
    "aggregate",
    "aggregation_denominator",
    "cispo_loss",
    "clipped_policy_loss",
    "group_advantages",
    "gspo_loss",
    "kl_penalty",
    "mean",
    "negative_log_likelihood",
    "rloo_advantages",
    "rollout_correction",
]
