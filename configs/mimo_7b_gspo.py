"""MiMo-7B-RL with GSPO (arXiv 2507.18071): configs/mimo_7b_dapo.py with the changes below.

    occ-jax train configs/mimo_7b_gspo.py --model.checkpoint DIR --mtp.regime occ

GSPO clips the ratios of whole sequences, with far tighter limits, and gives every completion the
same weight. It has neither the dual clip nor the dynamic sampling of DAPO
(`--rollout.dynamic-sampling` adds the latter).

arXiv 2605.28184 reports after 200 steps, avg@32 in percent, mean of the six sets:

    detach 57.8      ce 50.0      policy 56.2      occ 60.1

Data and hardware are those of configs/mimo_7b_dapo.py; only the loss differs.
"""

import dataclasses

import mimo_7b_dapo

from occ_jax.config import Config


def get_config() -> Config:
    dapo = mimo_7b_dapo.get_config()
    return dataclasses.replace(
        dapo,
        rollout=dataclasses.replace(dapo.rollout, dynamic_sampling=False),
        algorithm=dataclasses.replace(
            dapo.algorithm,
            policy_loss="gspo",
            clip_low=3e-4,
            clip_high=4e-4,
            dual_clip=None,
            aggregation="seq-mean-token-mean",
        ),
        run=dataclasses.replace(dapo.run, directory="runs/mimo_7b_gspo"),
    )
