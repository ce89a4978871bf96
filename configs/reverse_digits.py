"""Reverses six digits, "314159=" -> "951413": the demo.

    occ-jax train configs/reverse_digits.py

Hardware: 2 CPU cores, about two minutes. After the supervised warm-up the policy is right on less
than half of the prompts; 300 RL steps (regime occ, estimator log_prob) raise that above 90%.
"""

from occ_jax.config import Config, RolloutConfig, RunConfig, TaskConfig, WarmStartConfig


def get_config() -> Config:
    return Config(
        task=TaskConfig(name="reverse_digits", digits=6),
        warm_start=WarmStartConfig(steps=70, seed=1),
        rollout=RolloutConfig(num_prompts=32, group_size=16, max_new_tokens=8),
        run=RunConfig(
            directory="runs/reverse_digits", steps=300, evaluate_every=25, checkpoint_every=50
        ),
    )
