"""From prompts to completions and their log-probabilities."""

from occ_jax.rollout.sampler import sample as sample
