"""Reinforcement learning from verifiable rewards: advantages, losses, updates."""

from occ_jax.rl.advantages import (
    group_advantages as group_advantages,
    rloo_advantages as rloo_advantages,
)
from occ_jax.rl.losses import (
    AGGREGATIONS as AGGREGATIONS,
    Aggregation as Aggregation,
    Loss as Loss,
    aggregate as aggregate,
    aggregation_denominator as aggregation_denominator,
    cispo_loss as cispo_loss,
    clipped_policy_loss as clipped_policy_loss,
    gspo_loss as gspo_loss,
    kl_penalty as kl_penalty,
    mean as mean,
    negative_log_likelihood as negative_log_likelihood,
    rollout_correction as rollout_correction,
)
