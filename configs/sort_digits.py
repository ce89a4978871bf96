"""Sorts six digits, "314159=" -> "113459".

    occ-jax train configs/sort_digits.py

Hardware: 2 CPU cores.
"""

from occ_jax.config import Config, RolloutConfig, RunConfig, TaskConfig, WarmStartConfig


def get_config() -> Config:
    return Config(
        task=TaskConfig(name="sort_digits", digits=6),
        warm_start=WarmStartConfig(steps=45),
        rollout=RolloutConfig(num_prompts=32, group_size=16, max_new_tokens=8),
        run=RunConfig(directory="runs/sort_digits", steps=100, evaluate_every=10),
    )
