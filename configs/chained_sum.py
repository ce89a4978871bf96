"""Adds four digits step by step, "8+5+9+6=" -> "13>22>28"; the last number decides.

    occ-jax train configs/chained_sum.py

Many completions end in the right number, so there is sampled accuracy but no exact objective.
Hardware: 2 CPU cores.
"""

from occ_jax.config import Config, RolloutConfig, RunConfig, TaskConfig, WarmStartConfig


def get_config() -> Config:
    return Config(
        task=TaskConfig(name="chained_sum", digits=1, terms=4),
        warm_start=WarmStartConfig(steps=120),
        rollout=RolloutConfig(num_prompts=32, group_size=16, max_new_tokens=9),
        run=RunConfig(directory="runs/chained_sum", steps=100, evaluate_every=10),
    )
