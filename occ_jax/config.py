"""Everything a run can be told, as frozen dataclasses that refuse bad values at construction.

This file owns names, defaults and validation; it computes nothing. A `Config` is hashable, so it
can be a static argument of a jitted function, and `to_dict`/`from_dict` round-trip through JSON, so
the file saved with a run is enough to repeat it.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from occ_jax.errors import UserError

Regime = Literal["detach", "ce", "policy", "occ"]
Estimator = Literal["exact", "cross_batch", "log_prob", "released"]
HeadLoss = Literal["ce", "distill", "policy"]
Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]
TaskName = Literal["reverse_digits", "sort_digits", "addition", "chained_sum"]
DType = Literal["float32", "bfloat16"]
Thinking = Literal["template", "on", "off"]

_T = TypeVar("_T")


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise UserError(f"{name} is {value!r}; it must be {allowed}")


def _require_positive(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0 and math.isfinite(value), f"{section}.{name}", value, "positive")


def _require_not_negative(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= 0 and math.isfinite(value), f"{section}.{name}", value, "0 or more")


def _require_choice(section: str, config: object, name: str, choices: object) -> None:
    allowed = typing.get_args(choices)
    value = getattr(config, name)
    _require(value in allowed, f"{section}.{name}", value, f"one of {', '.join(allowed)}")


@dataclass(frozen=True)
class TaskConfig:
    """A procedurally generated digit task (`occ_jax.data.tasks`)."""

    name: TaskName = "reverse_digits"
    """Which task."""
    digits: int = 6
    """Digits to reverse or sort; digits of each summand in addition."""
    terms: int = 4
    """Summands of chained_sum (each of `digits` digits)."""
    seed: int = 0
    """Seed of the prompts; example i of a split depends on (seed, i) alone."""

    def __post_init__(self) -> None:
        _require_choice("task", self, "name", TaskName)
        # Below these the prompts are too few to be split in two.
        fewest = 2 if self.name in ("reverse_digits", "sort_digits") else 1
        _require(
            fewest <= self.digits <= 12,
            "task.digits",
            self.digits,
            f"between {fewest} and 12 for {self.name}",
        )
        _require(2 <= self.terms <= 9, "task.terms", self.terms, "between 2 and 9")
        _require(0 <= self.seed < 2**31, "task.seed", self.seed, "between 0 and 2^31 - 1")


@dataclass(frozen=True)
class DatasetConfig:
    """Problems prepared by `run.py prepare` (`occ_jax.data`); without a name `task` makes them."""

    name: str = ""
    """The prepared set that is trained on, such as dapo_math_17k. Empty for the digit task."""
    evaluation: tuple[str, ...] = ()
    """The prepared sets that are evaluated on, such as aime24 math500."""
    directory: str = "data"
    """Where `run.py prepare` put them."""
    template: str = (
        "{problem}\n\nThink step by step. Close with a line that holds nothing but "
        '"Answer: " and the answer.'
    )
    """The user's message around a problem. Sets that ship whole messages are used as they are."""
    system: str = ""
    """The system message put before conversations that have none; empty for none."""
    chat: bool = True
    """Render prompts with the checkpoint's chat template; False takes them as plain text."""
    thinking: Thinking = "template"
    """enable_thinking of the chat template: on, off, or the template's own choice."""
    overlong: Literal["error", "drop"] = "error"
    """Training prompts above rollout.max_prompt_tokens: refuse to start, or leave them out."""

    def __post_init__(self) -> None:
        for name in (*([self.name] if self.name else []), *self.evaluation):
            _require(
                re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None,
                "dataset.name" if name == self.name else "dataset.evaluation",
                name,
                "the name of a prepared set: lower-case letters, digits and _",
            )
        _require(
            len(set(self.evaluation)) == len(self.evaluation),
            "dataset.evaluation",
            self.evaluation,
            "without repetitions",
        )
        _require(
            bool(self.name) == bool(self.evaluation),
            "dataset.evaluation",
            self.evaluation,
            "one or more sets with dataset.name, and none without it (a digit task brings its own)",
        )
        _require(bool(self.directory), "dataset.directory", self.directory, "a path")
        _require(
            self.template.count("{problem}") == 1,
            "dataset.template",
            self.template,
            "a text with {problem} in it once",
        )
        _require_choice("dataset", self, "thinking", Thinking)
        _require_choice("dataset", self, "overlong", Literal["error", "drop"])
        _require(
            self.chat or (not self.system and self.thinking == "template"),
            "dataset.chat",
            self.chat,
            "True with dataset.system or dataset.thinking, which speak to a chat template",
        )


@dataclass(frozen=True)
class YarnConfig:
    """Context extension of RoPE by interpolating its low frequencies (YaRN, arXiv 2309.00071)."""

    factor: float = 40.0
    """Extended over original context length."""
    original_max_positions: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    """Dimensions that turn fewer times than this over the original context are interpolated."""
    attention_factor: float = 1.0
    """Multiplies sines and cosines."""
    softmax_factor: float = 1.0
    """Multiplies the softmax scale (DeepSeek-V3: the square of its mscale)."""
    truncate: bool = True
    """Whether the bounds of the interpolated range are rounded to whole dimensions."""

    def __post_init__(self) -> None:
        _require_positive(
            "model.yarn",
            self,
            *("factor", "original_max_positions", "beta_fast", "beta_slow"),
            *("attention_factor", "softmax_factor"),
        )


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    query_rank: int = 1536
    """Width of the compressed query; 0 projects queries directly."""
    kv_rank: int = 512
    """Width of the compressed keys and values, which is what the cache holds."""
    nope_head_dim: int = 128
    rope_head_dim: int = 64
    """Rotated part of a head's key, shared by all heads."""
    value_head_dim: int = 128

    def __post_init__(self) -> None:
        names = ("kv_rank", "nope_head_dim", "rope_head_dim", "value_head_dim")
        _require_positive("model.latent_attention", self, *names)
        _require_not_negative("model.latent_attention", self, "query_rank")
        _require(
            self.rope_head_dim % 2 == 0,
            "model.latent_attention.rope_head_dim",
            self.rope_head_dim,
            "even (RoPE)",
        )


@dataclass(frozen=True)
class DeltaNetConfig:
    """Gated delta-net layers between full-attention layers (arXiv 2412.06464; Qwen3-Next)."""

    num_key_heads: int = 16
    num_value_heads: int = 32
    key_head_dim: int = 128
    value_head_dim: int = 128
    conv_width: int = 4
    full_attention_interval: int = 4
    """Every n-th layer attends in full; the others are delta-net layers."""
    chunk_size: int = 64
    """Tokens worked on by matrix products at once; no effect on the result."""

    def __post_init__(self) -> None:
        _require_positive(
            "model.delta_net",
            self,
            *("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim"),
            *("full_attention_interval", "chunk_size"),
        )
        _require(self.conv_width >= 2, "model.delta_net.conv_width", self.conv_width, "2 or more")
        _require(
            self.num_value_heads % self.num_key_heads == 0,
            "model.delta_net.num_key_heads",
            self.num_key_heads,
            f"a divisor of model.delta_net.num_value_heads ({self.num_value_heads})",
        )


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts feed-forward layers, no token dropped (DeepSeek-V3, arXiv 2412.19437)."""

    num_experts: int = 128
    experts_per_token: int = 8
    intermediate_size: int = 1408
    """Width of one routed expert."""
    shared_intermediate_size: int = 1408
    """Width of the expert every token passes; 0 for none."""
    shared_gate: bool = False
    """Whether a sigmoid gate scales the shared expert (Qwen3-Next)."""
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    """sigmoid: chosen by score plus correction bias, weighted by score; softmax: by probability."""
    normalize_weights: bool = True
    """Whether the weights of the chosen experts are divided by their sum."""
    weight_scale: float = 1.0
    """Factor on the weights of the routed experts."""
    num_groups: int = 1
    groups_per_token: int = 1
    """Experts are chosen among those of this many groups (node-limited routing); sigmoid only."""
    first_dense_layers: int = 0
    """Layers before the first mixture-of-experts layer."""
    dense_layers: tuple[int, ...] = ()
    """Numbers of further layers without experts (Qwen3-Next's config allows them)."""

    def __post_init__(self) -> None:
        _require_positive(
            "model.moe",
            self,
            *("num_experts", "experts_per_token", "intermediate_size", "weight_scale"),
            *("num_groups", "groups_per_token"),
        )
        _require_not_negative("model.moe", self, "shared_intermediate_size", "first_dense_layers")
        _require_choice("model.moe", self, "router", Literal["sigmoid", "softmax"])
        _require(
            self.experts_per_token <= self.num_experts,
            "model.moe.experts_per_token",
            self.experts_per_token,
            f"at most model.moe.num_experts ({self.num_experts})",
        )
        _require(
            self.num_experts % self.num_groups == 0,
            "model.moe.num_groups",
            self.num_groups,
            f"a divisor of model.moe.num_experts ({self.num_experts})",
        )
        _require(
            self.num_groups == 1 or self.router == "sigmoid",
            "model.moe.num_groups",
            self.num_groups,
            "1 with model.moe.router softmax",
        )
        reachable = self.groups_per_token * (self.num_experts // self.num_groups)
        _require(
            self.groups_per_token <= self.num_groups and self.experts_per_token <= reachable,
            "model.moe.groups_per_token",
            self.groups_per_token,
            f"at most model.moe.num_groups ({self.num_groups}), and enough for "
            f"{self.experts_per_token} experts",
        )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with sequential MTP modules (`occ_jax.models`), composed of parts.

    A layer's mixer is attention, latent attention or a delta net; its feed-forward part is dense or
    a mixture of experts. A Hugging Face directory in `checkpoint` decides all that describes the
    architecture (`occ_jax.models.huggingface`); the fields of the last group are free.
    """

    checkpoint: str = ""
    """A Hugging Face directory: architecture, starting parameters and tokenizer; "" for none."""

    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 16
    intermediate_size: int = 192
    vocab_size: int = 16
    """Rows of the token embedding; at least the tokenizer's size."""
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    """Share of a head's dimensions, from the first, that are rotated (GLM-4.5: 0.5)."""
    yarn: YarnConfig | None = None
    rms_norm_eps: float = 1e-6
    zero_centered_norm: bool = False
    """Norms multiply by 1 + scale instead of scale (Qwen3-Next)."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2, GLM-4.5)."""
    qk_norm: bool = False
    """RMSNorm of queries and keys per head, before RoPE (Qwen3)."""
    attention_gate: bool = False
    """Sigmoid gate on the output of every head, before the output projection (Qwen3-Next)."""
    tie_embeddings: bool = False
    latent_attention: LatentAttentionConfig | None = None
    delta_net: DeltaNetConfig | None = None
    moe: MoEConfig | None = None
    num_mtp_modules: int = 1
    """K: module k predicts the token k+1 places ahead."""
    mtp_concat: Literal["embed_hidden", "hidden_embed"] = "embed_hidden"
    """Order of the projection's input: hidden_embed for MiMo, else embed_hidden."""
    mtp_trunk_hidden: Literal["post_norm", "pre_norm"] = "post_norm"
    """Whether module 1 reads the trunk after or before its final norm."""

    param_dtype: DType = "float32"
    dtype: DType = "float32"
    """Type of activations and matrix products; norms, softmax, routers and losses are float32."""
    scan_layers: bool = False
    """One compiled layer run by a scan instead of one a layer: compile time of deep models."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, whole layers."""
    logits_columns: int = 0
    """Response columns whose logits over the vocabulary exist at once; 0 for all of them."""

    def __post_init__(self) -> None:
        _require_positive(
            "model",
            self,
            *("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
            *("intermediate_size", "vocab_size", "rope_theta", "rms_norm_eps"),
        )
        _require_not_negative("model", self, "num_mtp_modules", "logits_columns")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of model.num_heads ({self.num_heads})",
        )
        _require(
            0 < self.rope_fraction <= 1, "model.rope_fraction", self.rope_fraction, "in (0, 1]"
        )
        rotated = self.head_dim * self.rope_fraction
        _require(
            rotated == int(rotated) and rotated % 2 == 0,
            "model.head_dim",
            self.head_dim,
            f"such that the {rotated:g} dimensions that RoPE turns are even",
        )
        _require_choice("model", self, "mtp_concat", Literal["embed_hidden", "hidden_embed"])
        _require_choice("model", self, "mtp_trunk_hidden", Literal["post_norm", "pre_norm"])
        _require_choice("model", self, "param_dtype", DType)
        _require_choice("model", self, "dtype", DType)
        _require_choice("model", self, "remat", Literal["none", "dots", "full"])
        if self.moe is not None:
            _require(
                self.moe.first_dense_layers <= self.num_layers,
                "model.moe.first_dense_layers",
                self.moe.first_dense_layers,
                f"at most model.num_layers ({self.num_layers})",
            )
            _require(
                all(0 <= number < self.num_layers for number in self.moe.dense_layers),
                "model.moe.dense_layers",
                self.moe.dense_layers,
                f"numbers of layers, below model.num_layers ({self.num_layers})",
            )


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised warm-up, next-token and MTP cross-entropy, that gives the starting policy."""

    steps: int = 30
    """0 starts from random parameters."""
    batch_size: int = 256
    learning_rate: float = 3e-3
    mtp_weight: float = 0.3
    """Weight of the modules' cross-entropy (DeepSeek-V3 pre-trains with 0.3)."""
    seed: int = 0
    cache_directory: str = "runs/warm_starts"
    """Finished warm-ups are kept here, one directory per (model, task, warm start)."""

    def __post_init__(self) -> None:
        _require_not_negative("warm_start", self, "steps", "mtp_weight", "seed")
        _require_positive("warm_start", self, "batch_size", "learning_rate")


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling of the completions that are trained on (`occ_jax.rollout`)."""

    num_prompts: int = 32
    """Prompts a step."""
    group_size: int = 16
    """G: completions a prompt."""
    max_prompt_tokens: int = 0
    """P: columns of a prompt; 0 for as many as the digit task has characters."""
    max_new_tokens: int = 8
    temperature: float = 1.0
    old_log_probs: Literal["sampler", "trainer"] = "sampler"
    """Who computes log pi_old: the sampler while it samples, or a forward pass of the trainer."""
    dynamic_sampling: bool = False
    """Replace groups whose completions are all right or all wrong (DAPO)."""
    max_rounds: int = 8
    """Rollouts a step may spend on dynamic sampling before it is an error."""

    def __post_init__(self) -> None:
        _require_positive(
            "rollout", self, "num_prompts", "group_size", "max_new_tokens", "temperature"
        )
        _require_positive("rollout", self, "max_rounds")
        _require_not_negative("rollout", self, "max_prompt_tokens")
        _require_choice("rollout", self, "old_log_probs", Literal["sampler", "trainer"])
        _require(
            not (self.dynamic_sampling and self.group_size == 1),
            "rollout.group_size",
            self.group_size,
            "2 or more with dynamic sampling (a group of one has no variance)",
        )


@dataclass(frozen=True)
class AlgorithmConfig:
    """The RL objective on the main head (`occ_jax.rl`)."""

    policy_loss: Literal["clipped", "gspo", "cispo"] = "clipped"
    """GSPO clips ratios of whole sequences: give it clips of 3e-4 and 4e-4."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    """Bound on the ratio of tokens with negative advantage; clipped loss only."""
    aggregation: Aggregation = "token-mean"
    advantage: Literal["group", "group_mean", "rloo"] = "group"
    """group divides by the standard deviation (GRPO); group_mean does not (Dr. GRPO)."""
    kl_coefficient: float = 0.0
    """Weight of the KL penalty to the starting policy; 0 keeps no copy of it."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    entropy_coefficient: float = 0.0
    overlong_buffer_tokens: int = 0
    """Length of the soft punishment before rollout.max_new_tokens; 0 for none (DAPO)."""
    overlong_penalty: float = 1.0
    rollout_correction_cap: float | None = None
    """Largest importance weight from sampler to trainer, on every token's policy loss; None: no
    weights. For rollout.old_log_probs trainer, where the two may differ."""
    updates_per_rollout: int = 4
    """Mini-batches one rollout is split in, by prompt."""
    micro_batches: int = 1
    """M: pieces a mini-batch is accumulated over, by prompt."""

    def __post_init__(self) -> None:
        _require_choice("algorithm", self, "policy_loss", Literal["clipped", "gspo", "cispo"])
        _require_choice("algorithm", self, "aggregation", Aggregation)
        _require_choice("algorithm", self, "advantage", Literal["group", "group_mean", "rloo"])
        _require_choice("algorithm", self, "kl_estimator", Literal["k1", "k2", "k3"])
        _require_not_negative(
            "algorithm",
            self,
            *("clip_low", "clip_high", "kl_coefficient", "entropy_coefficient"),
            *("overlong_buffer_tokens", "overlong_penalty"),
        )
        _require_positive("algorithm", self, "updates_per_rollout", "micro_batches")
        if self.rollout_correction_cap is not None:
            _require_positive("algorithm", self, "rollout_correction_cap")
        if self.dual_clip is not None:
            _require(self.dual_clip > 1, "algorithm.dual_clip", self.dual_clip, "above 1")
            _require(
                self.policy_loss == "clipped",
                "algorithm.dual_clip",
                self.dual_clip,
                f"None with algorithm.policy_loss {self.policy_loss}",
            )
        _require(
            self.policy_loss != "gspo" or self.aggregation == "seq-mean-token-mean",
            "algorithm.aggregation",
            self.aggregation,
            "seq-mean-token-mean with algorithm.policy_loss gspo",
        )


@dataclass(frozen=True)
class MTPConfig:
    """How the MTP modules take part in training: the regime and its calibration."""

    regime: Regime = "occ"
    estimator: Estimator = "log_prob"
    """How occ measures c and v^2."""
    measure_every: int = 1
    """Measure c and v^2 every N-th update; the coefficient of the last one holds in between."""
    head_loss: HeadLoss = "ce"
    """What the module's own parameters minimise, every shared input stopped."""
    auxiliary_ratio: Literal["own", "main"] = "own"
    """Denominator of the module's importance ratio: its own old log-probs, or the main head's."""
    coefficient: float = 1.0
    """The fixed lambda of regimes ce and policy."""
    scale: float = 1.0
    """lambda_+ of occ."""
    decay: float = 0.9
    """EMA decay of c and v^2."""
    bounds: tuple[float, float] | None = None
    """Limits of lambda; None leaves it free, negative values included."""
    eps: float = 1e-8
    released_factor: float = 0.1
    """Factor of the released code's coefficient (estimator released only)."""

    def __post_init__(self) -> None:
        _require_choice("mtp", self, "regime", Regime)
        _require_choice("mtp", self, "estimator", Estimator)
        _require_choice("mtp", self, "head_loss", HeadLoss)
        _require_choice("mtp", self, "auxiliary_ratio", Literal["own", "main"])
        _require_positive("mtp", self, "measure_every", "scale", "eps", "released_factor")
        _require(math.isfinite(self.coefficient), "mtp.coefficient", self.coefficient, "finite")
        _require(0 <= self.decay < 1, "mtp.decay", self.decay, "at least 0 and below 1")
        if self.bounds is not None:
            low, high = self.bounds
            _require(low < high, "mtp.bounds", self.bounds, "(low, high) with low < high")
        _require(
            self.estimator != "released" or self.measure_every == 1,
            "mtp.measure_every",
            self.measure_every,
            "1 with mtp.estimator released, which has no memory between updates",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW after clipping; the trunk and the MTP modules are clipped apart."""

    learning_rate: float = 3e-4
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from 0."""
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("optimizer", self, "learning_rate", "eps", "clip_norm")
        _require_not_negative("optimizer", self, "warmup_steps", "weight_decay")
        _require(0 <= self.b1 < 1, "optimizer.b1", self.b1, "at least 0 and below 1")
        _require(0 <= self.b2 < 1, "optimizer.b2", self.b2, "at least 0 and below 1")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices used."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        _require_positive("mesh", self, "data", "fsdp", "tensor")


@dataclass(frozen=True)
class RunConfig:
    """Length, seeds and bookkeeping of a run."""

    directory: str = "runs/train"
    steps: int = 60
    """RL steps: one rollout and its updates each."""
    seed: int = 0
    """Seed of prompts' order and of sampling."""
    evaluate_every: int = 10
    evaluation_prompts: int = 512
    evaluation_samples: int = 4
    """Completions a prompt when accuracy is sampled."""
    checkpoint_every: int = 20
    keep_checkpoints: int = 2
    max_skipped_updates: int = 10
    """Consecutive updates with a non-finite loss or gradient before training stops."""
    num_logged_samples: int = 2
    """Completions written to samples.jsonl each step."""
    wandb_project: str = ""
    """Weights & Biases project that metrics also go to (docs/metrics.md); "" for none."""

    def __post_init__(self) -> None:
        _require_positive(
            "run",
            self,
            *("steps", "evaluate_every", "evaluation_prompts", "evaluation_samples"),
            *("checkpoint_every", "keep_checkpoints", "max_skipped_updates"),
        )
        _require(0 <= self.seed < 2**31, "run.seed", self.seed, "between 0 and 2^31 - 1")
        _require_not_negative("run", self, "num_logged_samples")
        _require(bool(self.directory), "run.directory", self.directory, "a path")


@dataclass(frozen=True)
class Config:
    """One experiment."""

    task: TaskConfig = field(default_factory=TaskConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        prompts, updates = self.rollout.num_prompts, self.algorithm.updates_per_rollout
        _require(
            prompts % updates == 0,
            "rollout.num_prompts",
            prompts,
            f"a multiple of algorithm.updates_per_rollout ({updates})",
        )
        micro = self.algorithm.micro_batches
        _require(
            (prompts // updates) % micro == 0,
            "algorithm.micro_batches",
            micro,
            f"a divisor of the {prompts // updates} prompts of a mini-batch "
            "(groups are never split)",
        )
        shards = self.mesh.data * self.mesh.fsdp
        rows = prompts // updates // micro * self.rollout.group_size
        _require(
            rows % shards == 0 and prompts % shards == 0,
            "rollout.num_prompts",
            prompts,
            f"such that prompts, and the {rows} rows of a micro-batch, divide over the "
            f"{shards} devices of mesh.data and mesh.fsdp",
        )
        for name, size in (
            ("num_heads", self.model.num_heads),
            ("num_kv_heads", self.model.num_kv_heads),
            ("intermediate_size", self.model.intermediate_size),
        ):
            _require(
                size % self.mesh.tensor == 0,
                "mesh.tensor",
                self.mesh.tensor,
                f"a divisor of model.{name} ({size})",
            )
        _require_dataset_fits(self)
        occ = self.mtp.regime == "occ"
        _require(
            self.model.num_mtp_modules > 0 or self.mtp.regime == "detach",
            "model.num_mtp_modules",
            self.model.num_mtp_modules,
            f"1 or more with mtp.regime {self.mtp.regime}",
        )
        _require(
            not (occ and self.mtp.estimator == "cross_batch" and micro < 2),
            "algorithm.micro_batches",
            micro,
            "2 or more with mtp.estimator cross_batch",
        )
        _require(
            not (occ and self.mtp.estimator == "log_prob" and updates < 2),
            "algorithm.updates_per_rollout",
            updates,
            "2 or more with mtp.estimator log_prob (the first update after a rollout has "
            "theta = theta_old and measures nothing)",
        )
        _require(
            self.algorithm.rollout_correction_cap is None
            or self.rollout.old_log_probs == "trainer",
            "algorithm.rollout_correction_cap",
            self.algorithm.rollout_correction_cap,
            "None with rollout.old_log_probs sampler, whose weights are all 1",
        )
        _require(
            self.algorithm.overlong_buffer_tokens <= self.rollout.max_new_tokens,
            "algorithm.overlong_buffer_tokens",
            self.algorithm.overlong_buffer_tokens,
            f"at most rollout.max_new_tokens ({self.rollout.max_new_tokens})",
        )


def _require_dataset_fits(config: Config) -> None:
    """What prepared problems ask of the other sections."""
    name = config.dataset.name
    if not name:
        return
    width, steps = config.rollout.max_prompt_tokens, config.warm_start.steps
    _require(width > 0, "rollout.max_prompt_tokens", width, f"positive with dataset.name {name}")
    _require(
        steps == 0,
        "warm_start.steps",
        steps,
        f"0 with dataset.name {name}, which holds no completions to imitate",
    )


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dictionaries of JSON values."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`, also after a JSON round trip (lists become tuples).

    Raises:
        UserError: for a field that does not exist or a value that is not allowed.
    """
    return _build(Config, values, "")


def model_from_dict(values: dict[str, Any]) -> ModelConfig:
    """`from_dict` for the section of the model alone."""
    return _build(ModelConfig, values, "model.")


def _build(kind: type[_T], values: dict[str, Any], path: str) -> _T:
    hints = typing.get_type_hints(kind)
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"the config has no {'field' if path else 'section'} {path}{name}")
        if isinstance(value, dict):
            options = (hints[name], *typing.get_args(hints[name]))
            (part,) = [option for option in options if dataclasses.is_dataclass(option)]
            assert isinstance(part, type)
            value = _build(part, typing.cast("dict[str, Any]", value), f"{path}{name}.")
        given[name] = tuple(typing.cast("list[Any]", value)) if isinstance(value, list) else value
    return kind(**given)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, as {"section.field": (old, new)}."""
    before, after = _flatten(to_dict(old)), _flatten(to_dict(new))
    names = dict.fromkeys((*before, *after))
    pairs = {name: (before.get(name), after.get(name)) for name in names}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


def _flatten(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = (
            _flatten(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
        )
        flat.update(inner)
    return flat


def computation(config: Config) -> Config:
    """The config with everything reset that compiled steps do not depend on.

    Used as the static argument of jitted functions, so that runs which differ in seed, directory or
    length share their compilations.
    """
    return dataclasses.replace(
        config,
        task=TaskConfig(),
        dataset=DatasetConfig(),
        warm_start=WarmStartConfig(),
        run=RunConfig(),
    )
