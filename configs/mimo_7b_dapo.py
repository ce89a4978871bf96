"""MiMo-7B-RL with DAPO: the experiment of arXiv 2605.28184; comments mark numbers of our own.

    occ-jax prepare dapo_math_17k --source FILE     and the six evaluation sets: docs/data.md
    occ-jax train configs/mimo_7b_dapo.py --model.checkpoint DIR --mtp.regime occ
    occ-jax evaluate configs/mimo_7b_dapo.py --checkpoint runs/mimo_7b_dapo --samples 32 --k 1 8 32

DIR is a Hugging Face directory of MiMo-7B-RL. The architecture below repeats its config.json, so
that a run can be planned without the weights. The four runs of the paper differ in `--mtp.regime`
alone; `ce` and `policy` also take a fixed `--mtp.coefficient`, for which the paper tries 0.1, 0.2,
0.5 and 1.

The paper reports after 200 steps, avg@32 in percent, mean of the six sets:

    detach 58.9      ce 47.7      policy 57.4      occ 61.7

Hardware, planned but not run (docs/results/plans.md has the tables):

    occ-jax plan configs/mimo_7b_dapo.py --topology v5e:8x8

64 TPU v5e of 16 GiB. On each chip an update takes 5.5 GiB, an evaluation 10.2 and a rollout 9.5;
5.6 of the rollout's are the keys and values of the 256 completions that are sampled at once
(`rollout.sampling_chunks`). Keys and values of all 2,048 completions would be 2,048 x 10,240 tokens
x 147,456 bytes = 3,092 GB. With another mesh and 16 chunks 32 v5e, 16 v6e or 4 v5p are enough.
"""

from occ_jax.config import (
    AlgorithmConfig,
    Config,
    DatasetConfig,
    MeshConfig,
    ModelConfig,
    MTPConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    WarmStartConfig,
)

# The words that DAPO-Math-17k puts around its problems (its dataset card), so that the evaluation
# sets, which ship bare problems, ask as training does and answers end in the line that is read.
PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    '{problem}\n\nRemember to put your answer on its own line after "Answer:".'
)
UPDATES_PER_ROLLOUT = 4


def get_config() -> Config:
    return Config(
        dataset=DatasetConfig(
            name="dapo_math_17k",
            evaluation=("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench"),
            template=PROMPT,
            overlong="drop",
        ),
        model=ModelConfig(
            hidden_size=4096,
            num_layers=36,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            intermediate_size=11008,
            vocab_size=151_680,
            rope_theta=640_000.0,
            rms_norm_eps=1e-5,
            qkv_bias=True,
            num_mtp_modules=1,
            mtp_concat="hidden_embed",
            mtp_trunk_hidden="pre_norm",
            # AdamW moves a weight by about the learning rate. bfloat16 has 8 significant bits, so
            # a step of 1e-6 rounds to nothing on every weight above 2.6e-4, and nearly all are:
            # the parameters that are added up have to be float32. Products are bfloat16.
            param_dtype="float32",
            dtype="bfloat16",
            scan_layers=True,
            # Layer inputs alone are kept: products of 10,240 tokens would be nine times as much.
            remat="full",
            # Where no kernel attends: no device has one.
            attention_columns=512,
            # 512 columns x 16 rows x 151,680 float32 logits are 5.0 GB over the mesh, not 80.
            logits_columns=512,
        ),
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(
            num_prompts=128,
            group_size=16,
            max_prompt_tokens=2048,
            max_new_tokens=8192,
            temperature=1.0,
            old_log_probs="trainer",
            # The keys and values of 256 rows of 10,240 tokens are 5.6 GiB of each of 64 devices.
            sampling_chunks=8,
            dynamic_sampling=True,
        ),
        # The reward of DAPO's release (verl): 1 for right and -1 for wrong, to which the length
        # penalty of 0 to -1 is added; the published rule, which pays for some lines with several
        # answers; completions cut by the length limit are judged too. Evaluation sets keep
        # math_verify.
        reward=RewardConfig(
            wrong=-1.0, truncated="judged", per_source=(("dapo_math_17k", "math_dapo"),)
        ),
        algorithm=AlgorithmConfig(
            clip_low=0.2,
            clip_high=0.28,
            dual_clip=10.0,
            aggregation="token-mean",
            overlong_buffer_tokens=4096,
            overlong_penalty=1.0,
            updates_per_rollout=UPDATES_PER_ROLLOUT,
            # One group of 16 rows at a time, 2 rows on each of the 8 places that rows lie over.
            micro_batches=32,
        ),
        mtp=MTPConfig(
            regime="occ",
            estimator="log_prob",
            # Ours, where the paper has neither: c and v² are averaged over updates, as the proxy is
            # 0 in the first after a rollout; and the module trains on cross-entropy, as λ times the
            # policy loss, which it gets there, starves it.
            decay=0.9,
            head_loss="ce",
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-6,
            # The paper's 10 warm-up steps are rollouts, as its trainer (verl) advances the
            # schedule once a rollout; this field counts updates.
            warmup_steps=10 * UPDATES_PER_ROLLOUT,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        # 8 divides query and key-value heads, the feed-forward width and the vocabulary.
        mesh=MeshConfig(fsdp=8, tensor=8),
        run=RunConfig(
            directory="runs/mimo_7b_dapo",
            steps=200,
            # 1,546 questions x 32 completions are as much sampling as 24 steps.
            evaluate_every=50,
            evaluation_prompts=1000,
            # At training's temperature; the released code validates with top_p 0.7, which the
            # sampler does not have.
            evaluation_samples=32,
            checkpoint_every=20,
        ),
    )
