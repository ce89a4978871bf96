"""MiMo-7B-RL with GSPO (arXiv 2507.18071), as configs/mimo_7b_dapo.py but for what is below.

    python run.py train configs/mimo_7b_gspo.py --model.checkpoint DIR --mtp.regime occ

Ratios of whole sequences are clipped, far more tightly, and every completion counts alike. GSPO has
neither the dual clip nor the dynamic sampling of DAPO (`--rollout.dynamic-sampling` adds it).

Reported by arXiv 2605.28184 after 200 steps, avg@32 in percent, the mean of the six sets:

    detach 57.8      ce 50.0      policy 56.2      occ 60.1

Data and hardware as for configs/mimo_7b_dapo.py, whose programs differ in the loss alone.
"""

import dataclasses

from configs import mimo_7b_dapo
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
