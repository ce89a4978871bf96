"""Adds two three-digit numbers, "086+986=" -> "2701" (units first); compares the regimes.

    occ-jax compare configs/addition.py --seeds 3

Hardware: 2 CPU cores, 6 minutes. docs/results/regimes.md has the table.
"""

from occ_jax.config import Config, RolloutConfig, RunConfig, TaskConfig, WarmStartConfig


def get_config() -> Config:
    return Config(
        task=TaskConfig(name="addition", digits=3),
        # Initial parameters differ in how soon they learn to carry; these are 40% right by then.
        warm_start=WarmStartConfig(steps=300, seed=1),
        rollout=RolloutConfig(num_prompts=32, group_size=16, max_new_tokens=5),
        run=RunConfig(
            directory="runs/addition", steps=140, evaluate_every=10, evaluation_prompts=1024
        ),
    )
