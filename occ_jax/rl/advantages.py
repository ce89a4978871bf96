"""Advantages: the reward of each completion relative to the other completions of its prompt.

Owns the group baselines. Leaves rewards and their shaping to `occ_jax.rewards`, and the use of one
advantage for all tokens of its completion to `occ_jax.rl.losses`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Real

# Published GRPO implementations add it to the standard deviation. It is here for agreement with
# them, not against a division by zero: constant groups are set to zero explicitly.
_STD_EPSILON = 1e-6


def group_advantages(
    rewards: Real[Array, "P G"], *, normalize_std: bool = True
) -> Float[Array, "P G"]:
    """Centres each reward on its group and, for GRPO, scales by the group's deviation.

    A_i = (R_i - mean(R)) / (std(R) + 1e-6), the deviation with G - 1 in its divisor (ddof 1);
    with `normalize_std=False` (Dr. GRPO) the division is left out.

    Args:
        rewards: rewards of the G completions of each of P prompts, any real dtype.
        normalize_std: divide by the group's standard deviation.

    Returns:
        Advantages, float32. A group of one has no baseline: its advantage is its reward. A group
        whose rewards are all equal gets exactly 0.

    Raises:
        ValueError: `rewards` is not two-dimensional, or its groups are empty.

    Example:
        >>> group_advantages(jnp.array([[1.0, -1.0, -1.0, 1.0]]), normalize_std=False).tolist()
        [[1.0, -1.0, -1.0, 1.0]]

    Source:
        GRPO, arXiv 2402.03300, section 4.1.2; Dr. GRPO, arXiv 2503.20783, section 3.
    """
    rewards = _as_groups(rewards)
    if rewards.shape[1] == 1:
        return rewards
    centred = _centre(rewards)
    if not normalize_std:
        return centred
    return centred / (jnp.std(rewards, axis=1, ddof=1, keepdims=True) + _STD_EPSILON)


def rloo_advantages(rewards: Real[Array, "P G"]) -> Float[Array, "P G"]:
    """Compares each reward with the mean of the *other* rewards of its group.

    A_i = R_i - mean_{j != i}(R_j) = (R_i - mean(R)) G / (G - 1).

    Args:
        rewards: rewards of the G completions of each of P prompts, any real dtype.

    Returns:
        Advantages, float32, in the unit of the rewards. Groups of one and constant groups are
        treated as in `group_advantages`.

    Raises:
        ValueError: `rewards` is not two-dimensional, or its groups are empty.

    Source:
        RLOO, arXiv 2402.14740, section 3.
    """
    rewards = _as_groups(rewards)
    size = rewards.shape[1]
    return rewards if size == 1 else _centre(rewards) * (size / (size - 1))


def _as_groups(rewards: Real[Array, "P G"]) -> Float[Array, "P G"]:
    if rewards.ndim != 2 or rewards.shape[1] == 0:
        raise ValueError(
            f"rewards has shape {rewards.shape}; allowed: [P, G], prompts by one or more "
            "completions"
        )
    return rewards.astype(jnp.float32)


def _centre(rewards: Float[Array, "P G"]) -> Float[Array, "P G"]:
    """Subtracts the group's mean; a constant group becomes exactly zero."""
    # The mean of n equal floats need not be that float (0.1 is a case), and the leftover, divided
    # by a deviation that is as small, would be a large advantage. Equality is exact.
    constant = rewards.max(axis=1, keepdims=True) == rewards.min(axis=1, keepdims=True)
    return jnp.where(constant, 0.0, rewards - rewards.mean(axis=1, keepdims=True))
