"""GLM-4.5-Air (106B, 12B active) with DAPO: configs/mimo_7b_dapo.py with the changes below.

    occ-jax train configs/glm45_air_dapo.py --model.checkpoint DIR --mtp.regime occ

arXiv 2605.28184 reports after 200 steps, avg@32 in percent, mean of the six sets:

    detach 65.9      ce 54.8      policy 64.4      occ 67.6

Hardware, planned but not run (docs/results/plans.md has the tables):

    occ-jax plan configs/glm45_air_dapo.py --topology v6e:8x16

128 TPU v6e of 32 GiB. On each chip an update takes 22.9 GiB; 13.1 of these are parameters, two
AdamW moments and gradients, all float32. A rollout takes 20.1 GiB; 3.6 of these are the keys and
values of the 256 completions that are sampled at once (256 rows x 10,240 tokens x 188,416 bytes,
over the mesh). With other meshes 256 v5e or 32 v5p are enough, except for the estimators exact and
cross_batch.
"""

import dataclasses

import mimo_7b_dapo

from occ_jax.config import Config, MeshConfig, MoEConfig


def get_config() -> Config:
    mimo = mimo_7b_dapo.get_config()
    return dataclasses.replace(
        mimo,
        model=dataclasses.replace(
            mimo.model,
            hidden_size=4096,
            num_layers=46,
            num_heads=96,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=10944,
            vocab_size=151_552,
            rope_theta=1_000_000.0,
            rope_fraction=0.5,
            rms_norm_eps=1e-5,
            qkv_bias=True,
            moe=MoEConfig(
                num_experts=128,
                experts_per_token=8,
                intermediate_size=1408,
                shared_intermediate_size=1408,
                router="sigmoid",
                normalize_weights=True,
                weight_scale=1.0,
                first_dense_layers=1,
            ),
            num_mtp_modules=1,
            mtp_concat="embed_hidden",
            mtp_trunk_hidden="post_norm",
        ),
        # 8 divides key-value heads, the width of an expert, the vocabulary and the experts.
        mesh=MeshConfig(fsdp=2, expert=8, tensor=8),
        run=dataclasses.replace(mimo.run, directory="runs/glm45_air_dapo"),
    )
