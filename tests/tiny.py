"""The smallest experiment that still does everything, shared by the tests of whole runs."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from occ_jax.config import (
    AlgorithmConfig,
    Config,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    WarmStartConfig,
)
from occ_jax.data.examples import Example
from occ_jax.data.tokenizer import Tokenizer
from occ_jax.rewards.judging import judge_completions
from occ_jax.rewards.pool import Judged, VerifierPool


@functools.cache
def one_worker() -> VerifierPool:
    """A pool for all tests of a process; its worker ends with it."""
    return VerifierPool(["exact_match", "last_step"], RewardConfig(workers=1))


def score_completions(
    config: Config, tokenizer: Tokenizer, examples: list[Example], completions: np.ndarray
) -> np.ndarray:
    """Scores of completions [P, G, R] of digit tasks."""
    return judge_completions(one_worker(), config, tokenizer, examples, completions)[0]


def verifier_saying(
    scores_of: Callable[[np.ndarray], np.ndarray], after: Callable[[], float] = lambda: 0.0
) -> Callable[..., tuple[np.ndarray, Judged]]:
    """Stands for `judge_completions`: scores [P, G] of completions [P, G, R], `after` seconds."""

    def judge(pool, config, tokenizer, examples, completions):
        scores = scores_of(completions)
        count = scores.size
        flat = scores.reshape(-1).astype(np.float32)
        return scores, Judged(flat, [None] * count, [""] * count, after(), count)

    return judge


def tiny_config(directory: Path, **run: object) -> Config:
    """Reverse two digits with one layer; seconds on a CPU."""
    return Config(
        task=TaskConfig(name="reverse_digits", digits=2),
        model=ModelConfig(
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            intermediate_size=32,
        ),
        warm_start=WarmStartConfig(
            steps=20, batch_size=32, cache_directory=str(directory / "warm_starts")
        ),
        rollout=RolloutConfig(num_prompts=4, group_size=4, max_new_tokens=4),
        algorithm=AlgorithmConfig(updates_per_rollout=2),
        run=RunConfig(
            **{
                "directory": str(directory / "run"),
                "steps": 6,
                "evaluate_every": 3,
                "evaluation_prompts": 8,
                "evaluation_samples": 2,
                "checkpoint_every": 2,
                **run,
            }
        ),
    )


def config_file(directory: Path, **run: object) -> Path:
    """A config file for the command line."""
    path = directory / "tiny.py"
    path.write_text(
        f"from pathlib import Path\nfrom tests.tiny import tiny_config\n\n\n"
        f"def get_config():\n    return tiny_config(Path({str(directory)!r}), **{run!r})\n"
    )
    return path
