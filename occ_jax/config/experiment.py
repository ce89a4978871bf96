"""All settings of a run, as frozen dataclasses that refuse bad values when they are made.

Owns the sections other than the model (`model.py`): names, defaults, help texts, and the rules that
join several fields. It computes nothing. A `Config` is hashable, so a jitted function can take it
as a static argument, and `to_dict`/`from_dict` (`dictionaries.py`) convert it to JSON and back, so
the file saved with a run is enough to repeat the run.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass
from typing import Annotated, Literal

from occ_jax.config.checks import (
    Bound,
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
)
from occ_jax.config.facts import Fact, fields_with, setting
from occ_jax.config.model import ModelConfig

Regime = Literal["detach", "ce", "policy", "occ"]
Estimator = Literal["exact", "cross_batch", "log_prob"]
HeadLoss = Literal["ce", "distill", "policy"]
Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]
TaskName = Literal["reverse_digits", "sort_digits", "addition", "chained_sum"]
Verifier = Literal["exact_match", "last_step", "math_dapo", "math_dapo_strict", "math_verify"]
Thinking = Literal["template", "on", "off"]


@dataclass(frozen=True)
class TaskConfig(Section, path="task"):
    """A digit task; its problems are generated (`occ_jax.data.tasks`)."""

    name: TaskName = "reverse_digits"
    """Task to train and evaluate on where dataset.name is empty."""
    digits: int = 6
    """Digits of the number to reverse or sort, or of each summand."""
    terms: Annotated[int, Bound("between 2 and 9", lambda x: 2 <= x <= 9)] = 4
    """Summands of chained_sum."""
    seed: Seed = 0
    """Seed of the problems; example i of a split depends on (seed, i) alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Fewer digits give too few problems for two splits.
        fewest = 2 if self.name in ("reverse_digits", "sort_digits") else 1
        self.require(
            fewest <= self.digits <= 12, "digits", f"between {fewest} and 12 for {self.name}"
        )


@dataclass(frozen=True)
class DatasetConfig(Section, path="dataset"):
    """Problems from `occ-jax prepare` (`occ_jax.data`); without a name, `task` generates them."""

    name: str = ""
    """Prepared set to train on, such as dapo_math_17k; empty for the digit task."""
    evaluation: tuple[str, ...] = ()
    """Prepared sets to evaluate on, such as aime24 math500."""
    directory: str = setting("data", Fact.MAY_CHANGE)
    """Directory that `occ-jax prepare` wrote the sets to."""
    template: str = (
        "{problem}\n\nThink step by step. Close with a line that holds nothing but "
        '"Answer: " and the answer.'
    )
    """User message around a problem. Sets with complete messages do not use it."""
    system: str = ""
    """System message of conversations that have none; empty for no system message."""
    chat: bool = True
    """Render prompts with the checkpoint's chat template; False uses them as plain text."""
    thinking: Thinking = "template"
    """Value of enable_thinking in the chat template; template leaves it to the template."""
    overlong: Literal["error", "drop"] = "error"
    """Training prompts longer than rollout.max_prompt_tokens: refuse to start, or drop them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (*([self.name] if self.name else []), *self.evaluation):
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                field = "name" if name == self.name else "evaluation"
                allowed = "the name of a prepared set: lower-case letters, digits and _"
                raise self.refuse(field, allowed, name)
        self.require(
            len(set(self.evaluation)) == len(self.evaluation), "evaluation", "without repetitions"
        )
        self.require(
            bool(self.name) == bool(self.evaluation),
            "evaluation",
            "one or more sets with dataset.name, and none without it (a digit task brings its own)",
        )
        self.require(bool(self.directory), "directory", "a path")
        self.require(
            self.template.count("{problem}") == 1, "template", "a text with {problem} in it once"
        )
        self.require(
            self.chat or (not self.system and self.thinking == "template"),
            "chat",
            "True with dataset.system or dataset.thinking, which need a chat template",
        )


@dataclass(frozen=True)
class WarmStartConfig(Section, path="warm_start"):
    """Supervised warm-up (next-token and MTP cross-entropy) that gives the starting policy."""

    steps: NonNegativeInt = 30
    """Updates of the warm-up; 0 for none."""
    batch_size: PositiveInt = 256
    """Examples per update."""
    learning_rate: PositiveFloat = 3e-3
    """Learning rate of Adam, constant."""
    mtp_weight: NonNegativeFloat = 0.3
    """Weight of the modules' cross-entropy (DeepSeek-V3 pre-trains with 0.3)."""
    seed: NonNegativeInt = 0
    """Seed of the random initial parameters, with or without a warm-up."""
    cache_directory: str = setting("runs/warm_starts", Fact.MAY_CHANGE | Fact.SAME_WARM_UP)
    """Directory of finished warm-ups; runs with the same model, task and warm-up share one."""


@dataclass(frozen=True)
class RolloutConfig(Section, path="rollout"):
    """Sampling of the completions that are trained on (`occ_jax.rollout`)."""

    num_prompts: PositiveInt = setting(32, Fact.SAME_SAMPLES)
    """Prompts per step."""
    group_size: PositiveInt = setting(16, Fact.SAME_SAMPLES)
    """G: completions per prompt."""
    max_prompt_tokens: NonNegativeInt = 0
    """P: tokens that prompts are padded to; 0 for the length of the digit task's prompts."""
    max_new_tokens: PositiveInt = 8
    """Tokens of a completion at most."""
    temperature: PositiveFloat = 1.0
    """Divisor of the logits, in sampling and in training."""
    old_log_probs: Literal["sampler", "trainer"] = setting("sampler", Fact.SAME_SAMPLES)
    """Source of log π_old: the sampler while it samples, or a forward pass of the trainer."""
    sampling_chunks: PositiveInt = 1
    """Chunks that a rollout's prompts are split into. Chunks are sampled one after another, and the
    KV cache holds one chunk."""
    gather_weights: bool = setting(True, Fact.MAY_CHANGE)
    """Gather the weights over `mesh.fsdp` (and those outside the experts over `mesh.expert`) once
    per rollout, in `model.dtype`. False gathers them layer by layer for every token, which takes
    less memory and many times as long."""
    dynamic_sampling: bool = setting(False, Fact.SAME_SAMPLES)
    """Replace groups whose completions are all right or all wrong (DAPO)."""
    max_rounds: PositiveInt = setting(8, Fact.MAY_CHANGE | Fact.SAME_SAMPLES)
    """Rollouts per step that dynamic sampling may take; a step that needs more is an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            not (self.dynamic_sampling and self.group_size == 1),
            "group_size",
            "2 or more with dynamic sampling (a group of one has no variance)",
        )


@dataclass(frozen=True)
class RewardConfig(Section, path="reward"):
    """How completions are scored (`occ_jax.rewards`).

    A verifier is exact_match, last_step, math_dapo, math_dapo_strict, math_verify, or a function of
    your own, written package.module:function or path/to/file.py:function.
    """

    verifier: str | None = None
    """Verifier of every source that `per_source` does not list; None for the source's default."""
    per_source: tuple[tuple[str, str], ...] = ()
    """Pairs of source and verifier."""
    wrong: Annotated[float, Bound("below 1", lambda x: x < 1)] = 0.0
    """Reward of a wrong completion, the lowest of all rewards; DAPO has -1. A right one has 1."""
    truncated: Literal["wrong", "judged"] = "wrong"
    """Completions cut by the length limit: wrong without judging, or judged like others."""
    workers: Annotated[int, Bound("1 or more", lambda x: x >= 1)] | None = setting(
        None, Fact.MAY_CHANGE
    )
    """Processes that run verifiers; None for one per CPU, at most 32."""
    deadline_s: PositiveFloat = 5.0
    """Seconds of wall time for one completion; after that its worker is killed and it scores 0."""
    memory_mib: Annotated[int, Bound("256 or more", lambda x: x >= 256)] = 2048
    """MiB that a worker may allocate; beyond that the completion scores 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sources = [source for source, _ in self.per_source]
        self.require(
            len(set(sources)) == len(sources), "per_source", "such that no source is named twice"
        )
        verifiers = [("per_source", verifier) for _, verifier in self.per_source]
        if self.verifier is not None:
            verifiers.append(("verifier", self.verifier))
        names = typing.get_args(Verifier)
        for field, verifier in verifiers:
            module, _, function = verifier.rpartition(":")
            if verifier not in names and not (module and function.isidentifier()):
                allowed = (
                    f"one of {', '.join(names)}, package.module:function or "
                    "path/to/file.py:function"
                )
                raise self.refuse(field, allowed, verifier)


@dataclass(frozen=True)
class AlgorithmConfig(Section, path="algorithm"):
    """The RL objective of the main head (`occ_jax.rl`)."""

    policy_loss: Literal["clipped", "gspo", "cispo"] = "clipped"
    """clipped as in PPO and DAPO; gspo clips ratios of whole sequences, so give it small clips such
    as 3e-4 and 4e-4."""
    clip_low: NonNegativeFloat = 0.2
    """Ratios are clipped at 1 - clip_low."""
    clip_high: NonNegativeFloat = 0.28
    """Ratios are clipped at 1 + clip_high."""
    dual_clip: Annotated[float, Bound("above 1", lambda x: x > 1)] | None = None
    """Bound on the ratio of tokens with negative advantage; clipped loss only; None for none."""
    aggregation: Aggregation = "token-mean"
    """How losses of tokens are averaged."""
    advantage: Literal["group", "group_mean", "rloo"] = "group"
    """group divides by the standard deviation (GRPO); group_mean does not (Dr. GRPO)."""
    kl_coefficient: NonNegativeFloat = 0.0
    """Weight of the KL penalty to the starting policy; 0 keeps no copy of that policy."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How the KL of the penalty is estimated from sampled tokens."""
    entropy_coefficient: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    overlong_buffer_tokens: NonNegativeInt = 0
    """Tokens before rollout.max_new_tokens over which the length penalty grows (DAPO); 0: none."""
    overlong_penalty: NonNegativeFloat = 1.0
    """Length penalty of a completion with rollout.max_new_tokens tokens."""
    rollout_correction_cap: PositiveFloat | None = None
    """Largest importance weight from sampler to trainer, on every token's policy loss; None for no
    weights. It needs rollout.old_log_probs trainer, as only then the two may differ."""
    updates_per_rollout: PositiveInt = 4
    """Mini-batches that the prompts of a rollout are split into; each gives one update."""
    micro_batches: PositiveInt = 1
    """M: micro-batches that the prompts of a mini-batch are split into; their gradients add up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.dual_clip is None or self.policy_loss == "clipped",
            "dual_clip",
            f"None with algorithm.policy_loss {self.policy_loss}",
        )
        self.require(
            self.policy_loss != "gspo" or self.aggregation == "seq-mean-token-mean",
            "aggregation",
            "seq-mean-token-mean with algorithm.policy_loss gspo",
        )


@dataclass(frozen=True)
class MTPConfig(Section, path="mtp"):
    """How the MTP modules are trained: the regime and its calibration."""

    regime: Regime = "occ"
    """How a module's loss trains the trunk: not at all (detach), its cross-entropy (ce) or policy
    loss (policy) with a fixed λ, or its policy loss with a calibrated λ (occ)."""
    estimator: Estimator = "log_prob"
    """How occ measures c and v²."""
    measure_every: PositiveInt = 1
    """Measure c and v² every N-th update; updates between use the last λ."""
    head_loss: HeadLoss = "ce"
    """Loss of the module's own parameters; its gradient stops at all that the trunk shares."""
    auxiliary_ratio: Literal["own", "main"] = "own"
    """Denominator of the module's importance ratio: its own old log-probs, or the main head's."""
    coefficient: float = 1.0
    """Fixed λ of the regimes ce and policy."""
    scale: PositiveFloat = 1.0
    """λ₊: factor on the calibrated λ of occ."""
    decay: Decay = 0.9
    """Decay of the moving averages of c and v²; 0 uses each measurement alone."""
    bounds: tuple[float, float] | None = None
    """Smallest and largest λ of occ; None for no limits, so λ can be negative."""
    eps: PositiveFloat = 1e-8
    """Added to v² where λ divides by it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bounds is not None:
            low, high = self.bounds
            self.require(low < high, "bounds", "(low, high) with low < high")


@dataclass(frozen=True)
class OptimizerConfig(Section, path="optimizer"):
    """AdamW after clipping; trunk and MTP modules are clipped separately."""

    learning_rate: PositiveFloat = 3e-4
    """Learning rate after the warm-up, constant."""
    warmup_steps: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly from 0."""
    b1: Decay = 0.9
    """Decay of the moving average of gradients."""
    b2: Decay = 0.999
    """Decay of the moving average of squared gradients."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the average squared gradient."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, multiplied by the learning rate."""
    clip_norm: PositiveFloat = 1.0
    """Largest global norm of a gradient."""


@dataclass(frozen=True)
class MeshConfig(Section, path="mesh"):
    """Devices along each mesh axis; their product is the number of devices used."""

    data: PositiveInt = 1
    """Copies of the parameters; rows are split over them."""
    fsdp: PositiveInt = 1
    """Shards of parameters and rows."""
    tensor: PositiveInt = 1
    """Shards of heads, feed-forward width and vocabulary."""
    expert: PositiveInt = 1
    """Shards of a mixture's experts; rows and all other parameters are split over them as well."""

    @property
    def row_shards(self) -> int:
        """Shards that the rows of a batch are split into."""
        return self.data * self.fsdp * self.expert


@dataclass(frozen=True)
class RunConfig(Section, path="run"):
    """Length, seeds and files of a run."""

    directory: str = setting("runs/train", Fact.MAY_CHANGE)
    """Directory of the run: config, metrics, samples and checkpoints."""
    steps: PositiveInt = setting(60, Fact.MAY_CHANGE)
    """RL steps; each is one rollout and its updates."""
    seed: Seed = 0
    """Seed of the order of prompts and of sampling."""
    evaluate_every: PositiveInt = 10
    """Steps between evaluations."""
    evaluation_prompts: PositiveInt = 512
    """Prompts of every set that an evaluation takes at most."""
    evaluation_samples: PositiveInt = 4
    """Completions per prompt where an evaluation samples."""
    checkpoint_every: PositiveInt = setting(20, Fact.MAY_CHANGE)
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = setting(2, Fact.MAY_CHANGE)
    """Newest checkpoints that are kept; there is one more while the next is written."""
    keep_every: NonNegativeInt = setting(0, Fact.MAY_CHANGE)
    """Keep the checkpoints of steps that are multiples of this for good; 0 for none."""
    max_skipped_updates: PositiveInt = 10
    """Consecutive updates with a non-finite loss or gradient that end training."""
    num_logged_samples: NonNegativeInt = 2
    """Completions written to samples.jsonl per step."""
    wandb_project: str = setting("", Fact.MAY_CHANGE)
    """Weights & Biases project that also receives the metrics (docs/metrics.md); "" for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.directory), "directory", "a path")


_NOT_PARAMETERS = Fact.SAME_MODEL | Fact.SAME_WARM_UP


@dataclass(frozen=True)
class Config(Section, path=""):
    """All settings of one run."""

    task: TaskConfig = setting(TaskConfig(), Fact.SAME_MODEL | Fact.SAME_PROGRAM)
    dataset: DatasetConfig = setting(DatasetConfig(), _NOT_PARAMETERS | Fact.SAME_PROGRAM)
    model: ModelConfig = setting(ModelConfig())
    warm_start: WarmStartConfig = setting(WarmStartConfig(), Fact.SAME_MODEL | Fact.SAME_PROGRAM)
    rollout: RolloutConfig = setting(RolloutConfig(), _NOT_PARAMETERS)
    reward: RewardConfig = setting(RewardConfig(), _NOT_PARAMETERS | Fact.SAME_PROGRAM)
    algorithm: AlgorithmConfig = setting(AlgorithmConfig(), _NOT_PARAMETERS)
    mtp: MTPConfig = setting(MTPConfig(), _NOT_PARAMETERS)
    optimizer: OptimizerConfig = setting(OptimizerConfig(), _NOT_PARAMETERS)
    mesh: MeshConfig = setting(MeshConfig(), _NOT_PARAMETERS | Fact.MAY_CHANGE)
    run: RunConfig = setting(RunConfig(), _NOT_PARAMETERS | Fact.SAME_PROGRAM)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_batches_divide()
        self._require_mesh_divides()
        self._require_dataset_fits()
        self._require_objective_fits()

    def _require_batches_divide(self) -> None:
        """Refuses a rollout that updates, micro-batches, chunks or mesh cannot split evenly."""
        prompts, updates = self.rollout.num_prompts, self.algorithm.updates_per_rollout
        self.require(
            prompts % updates == 0,
            "rollout.num_prompts",
            f"a multiple of algorithm.updates_per_rollout ({updates})",
        )
        micro = self.algorithm.micro_batches
        self.require(
            (prompts // updates) % micro == 0,
            "algorithm.micro_batches",
            f"a divisor of the {prompts // updates} prompts of a mini-batch "
            "(groups are never split)",
        )
        shards = self.mesh.row_shards
        rows = prompts // updates // micro * self.rollout.group_size
        self.require(
            rows % shards == 0 and prompts % shards == 0,
            "rollout.num_prompts",
            f"such that prompts, and the {rows} rows of a micro-batch, divide over the "
            f"{shards} shards of mesh.data, mesh.fsdp and mesh.expert",
        )
        chunks = self.rollout.sampling_chunks
        self.require(
            prompts % chunks == 0 and prompts // chunks % shards == 0,
            "rollout.sampling_chunks",
            f"such that it divides rollout.num_prompts ({prompts}), and a chunk divides over the "
            f"{shards} shards of mesh.data, mesh.fsdp and mesh.expert",
        )

    def _require_mesh_divides(self) -> None:
        """Refuses axes that would leave a large parameter, or a cache, in one piece."""
        mesh, model = self.mesh, self.model
        moe, latent, net = model.moe, model.latent_attention, model.delta_net
        tensor = {"num_heads": model.num_heads, "vocab_size": model.vocab_size}
        stored = {"hidden_size": model.hidden_size}
        if moe is None or moe.first_dense_layers or moe.dense_layers:
            tensor["intermediate_size"] = model.intermediate_size
        if moe is not None:
            tensor["moe.intermediate_size"] = moe.intermediate_size
            tensor["moe.shared_intermediate_size"] = moe.shared_intermediate_size  # 0: no matter
        if latent is None:
            tensor["num_kv_heads"] = model.num_kv_heads
        else:
            stored["latent_attention.query_rank"] = latent.query_rank
            stored["latent_attention.kv_rank"] = latent.kv_rank
        if net is not None:
            tensor["delta_net.num_value_heads"] = net.num_value_heads
        common = math.gcd(*tensor.values())
        if common % mesh.tensor:
            divisors = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            sizes = ", ".join(f"model.{name} {size}" for name, size in tensor.items())
            allowed = f"one of {divisors}, the divisors of {sizes}"
            raise self.refuse("mesh.tensor", allowed, mesh.tensor)
        shards = mesh.fsdp * mesh.expert
        for name, size in stored.items():
            self.require(
                size % shards == 0,
                "mesh.fsdp",
                f"such that mesh.fsdp x mesh.expert ({shards}) divides model.{name} ({size})",
            )
        self.require(
            moe is not None or mesh.expert == 1,
            "mesh.expert",
            "1 for a model without experts (model.moe)",
        )
        if moe is not None:
            self.require(
                moe.num_experts % mesh.expert == 0,
                "mesh.expert",
                f"a divisor of model.moe.num_experts ({moe.num_experts})",
            )

    def _require_dataset_fits(self) -> None:
        """Refuses sections that do not go with prepared problems."""
        name = self.dataset.name
        if not name:
            return
        self.require(
            self.rollout.max_prompt_tokens > 0,
            "rollout.max_prompt_tokens",
            f"positive with dataset.name {name}",
        )
        self.require(
            self.warm_start.steps == 0,
            "warm_start.steps",
            f"0 with dataset.name {name}, which holds no completions to imitate",
        )

    def _require_objective_fits(self) -> None:
        """Refuses regimes, estimators and losses that lack what they need."""
        occ = self.mtp.regime == "occ"
        self.require(
            self.model.num_mtp_modules > 0 or self.mtp.regime == "detach",
            "model.num_mtp_modules",
            f"1 or more with mtp.regime {self.mtp.regime}",
        )
        self.require(
            not (occ and self.mtp.estimator == "cross_batch" and self.algorithm.micro_batches < 2),
            "algorithm.micro_batches",
            "2 or more with mtp.estimator cross_batch",
        )
        self.require(
            not (
                occ and self.mtp.estimator == "log_prob" and self.algorithm.updates_per_rollout < 2
            ),
            "algorithm.updates_per_rollout",
            "2 or more with mtp.estimator log_prob (the first update after a rollout has θ = θ_old "
            "and measures nothing)",
        )
        self.require(
            self.algorithm.rollout_correction_cap is None
            or self.rollout.old_log_probs == "trainer",
            "algorithm.rollout_correction_cap",
            "None with rollout.old_log_probs sampler, whose weights are all 1",
        )
        self.require(
            self.algorithm.overlong_buffer_tokens <= self.rollout.max_new_tokens,
            "algorithm.overlong_buffer_tokens",
            f"at most rollout.max_new_tokens ({self.rollout.max_new_tokens})",
        )


def computation(config: Config) -> Config:
    """The config with the default of every section that compiled programs do not read.

    Jitted functions take it as their static argument, so runs that differ in seed, directory or
    length share compiled programs.
    """
    unread = fields_with(Fact.SAME_PROGRAM, Config)
    sections = {f.name: f.default for f in dataclasses.fields(config) if f.name in unread}
    return dataclasses.replace(config, **sections)
