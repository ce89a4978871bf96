"""Everything a run can be told, as frozen dataclasses that refuse bad values at construction.

This file owns names, defaults and validation; it computes nothing, and leaves what a model is made
of to `occ_jax.config`. A `Config` is hashable, so it can be a static argument of a jitted
function, and `to_dict`/`from_dict` round-trip through JSON, so the file saved with a run is enough
to repeat it.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from occ_jax.config.checks import require, require_choice, require_not_negative, require_positive
from occ_jax.config.model import ModelConfig
from occ_jax.errors import UserError

Regime = Literal["detach", "ce", "policy", "occ"]
Estimator = Literal["exact", "cross_batch", "log_prob"]
HeadLoss = Literal["ce", "distill", "policy"]
Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]
TaskName = Literal["reverse_digits", "sort_digits", "addition", "chained_sum"]
Verifier = Literal["exact_match", "last_step", "math_dapo", "math_dapo_strict", "math_verify"]
Thinking = Literal["template", "on", "off"]

_T = TypeVar("_T")


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
        require_choice("task", self, "name", TaskName)
        # Below these the prompts are too few to be split in two.
        fewest = 2 if self.name in ("reverse_digits", "sort_digits") else 1
        require(
            fewest <= self.digits <= 12,
            "task.digits",
            self.digits,
            f"between {fewest} and 12 for {self.name}",
        )
        require(2 <= self.terms <= 9, "task.terms", self.terms, "between 2 and 9")
        require(0 <= self.seed < 2**31, "task.seed", self.seed, "between 0 and 2^31 - 1")


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
            require(
                re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None,
                "dataset.name" if name == self.name else "dataset.evaluation",
                name,
                "the name of a prepared set: lower-case letters, digits and _",
            )
        require(
            len(set(self.evaluation)) == len(self.evaluation),
            "dataset.evaluation",
            self.evaluation,
            "without repetitions",
        )
        require(
            bool(self.name) == bool(self.evaluation),
            "dataset.evaluation",
            self.evaluation,
            "one or more sets with dataset.name, and none without it (a digit task brings its own)",
        )
        require(bool(self.directory), "dataset.directory", self.directory, "a path")
        require(
            self.template.count("{problem}") == 1,
            "dataset.template",
            self.template,
            "a text with {problem} in it once",
        )
        require_choice("dataset", self, "thinking", Thinking)
        require_choice("dataset", self, "overlong", Literal["error", "drop"])
        require(
            self.chat or (not self.system and self.thinking == "template"),
            "dataset.chat",
            self.chat,
            "True with dataset.system or dataset.thinking, which speak to a chat template",
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
        require_not_negative("warm_start", self, "steps", "mtp_weight", "seed")
        require_positive("warm_start", self, "batch_size", "learning_rate")


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
    sampling_chunks: int = 1
    """Parts that a rollout's prompts are sampled in, one after the other: the KV cache is that of
    one part."""
    gather_weights: bool = True
    """Gather the weights from `mesh.fsdp` (and those outside the experts from `mesh.expert`) once a
    rollout, in `model.dtype`; False does it layer by layer for every token, which takes less memory
    and many times as long."""
    dynamic_sampling: bool = False
    """Replace groups whose completions are all right or all wrong (DAPO)."""
    max_rounds: int = 8
    """Rollouts a step may spend on dynamic sampling before it is an error."""

    def __post_init__(self) -> None:
        require_positive(
            "rollout", self, "num_prompts", "group_size", "max_new_tokens", "temperature"
        )
        require_positive("rollout", self, "sampling_chunks", "max_rounds")
        require_not_negative("rollout", self, "max_prompt_tokens")
        require_choice("rollout", self, "old_log_probs", Literal["sampler", "trainer"])
        require(
            not (self.dynamic_sampling and self.group_size == 1),
            "rollout.group_size",
            self.group_size,
            "2 or more with dynamic sampling (a group of one has no variance)",
        )


@dataclass(frozen=True)
class RewardConfig:
    """How completions are scored (`occ_jax.rewards`).

    A verifier is exact_match, last_step, math_dapo, math_dapo_strict, math_verify, or a function of
    your own, written package.module:function or path/to/file.py:function.
    """

    verifier: str | None = None
    """Of every source that `per_source` does not name; None takes the source's usual one."""
    per_source: tuple[tuple[str, str], ...] = ()
    """(source, verifier) pairs."""
    wrong: float = 0.0
    """Reward of a wrong completion, the lowest there is; a right one's is 1. DAPO takes -1."""
    truncated: Literal["wrong", "judged"] = "wrong"
    """Whether completions cut by the length limit are wrong unseen, or judged like others."""
    workers: int | None = None
    """Verifier processes; None takes one a CPU, at most 32."""
    deadline_s: float = 5.0
    """Wall-clock seconds for one completion; then its worker is killed and it scores 0."""
    memory_mib: int = 2048
    """Most memory a worker may allocate; beyond it the completion scores 0."""

    def __post_init__(self) -> None:
        pairs: tuple[tuple[str, ...], ...] = self.per_source  # what a file or caller may hold
        for pair in pairs:
            require(len(pair) == 2, "reward.per_source", pair, "(source, verifier) pairs")
        sources = [source for source, _ in self.per_source]
        require(
            len(set(sources)) == len(sources),
            "reward.per_source",
            self.per_source,
            "such that no source is named twice",
        )
        named = [("reward.per_source", verifier) for _, verifier in self.per_source]
        if self.verifier is not None:
            named.append(("reward.verifier", self.verifier))
        for name, verifier in named:
            module, _, function = verifier.rpartition(":")
            require(
                verifier in typing.get_args(Verifier) or bool(module and function.isidentifier()),
                name,
                verifier,
                f"one of {', '.join(typing.get_args(Verifier))}, package.module:function or "
                "path/to/file.py:function",
            )
        require(math.isfinite(self.wrong) and self.wrong < 1, "reward.wrong", self.wrong, "below 1")
        require_choice("reward", self, "truncated", Literal["wrong", "judged"])
        if self.workers is not None:
            require(self.workers >= 1, "reward.workers", self.workers, "1 or more, or None")
        require_positive("reward", self, "deadline_s")
        require(self.memory_mib >= 256, "reward.memory_mib", self.memory_mib, "256 or more")


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
        require_choice("algorithm", self, "policy_loss", Literal["clipped", "gspo", "cispo"])
        require_choice("algorithm", self, "aggregation", Aggregation)
        require_choice("algorithm", self, "advantage", Literal["group", "group_mean", "rloo"])
        require_choice("algorithm", self, "kl_estimator", Literal["k1", "k2", "k3"])
        require_not_negative(
            "algorithm",
            self,
            *("clip_low", "clip_high", "kl_coefficient", "entropy_coefficient"),
            *("overlong_buffer_tokens", "overlong_penalty"),
        )
        require_positive("algorithm", self, "updates_per_rollout", "micro_batches")
        if self.rollout_correction_cap is not None:
            require_positive("algorithm", self, "rollout_correction_cap")
        if self.dual_clip is not None:
            require(self.dual_clip > 1, "algorithm.dual_clip", self.dual_clip, "above 1")
            require(
                self.policy_loss == "clipped",
                "algorithm.dual_clip",
                self.dual_clip,
                f"None with algorithm.policy_loss {self.policy_loss}",
            )
        require(
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

    def __post_init__(self) -> None:
        require_choice("mtp", self, "regime", Regime)
        require_choice("mtp", self, "estimator", Estimator)
        require_choice("mtp", self, "head_loss", HeadLoss)
        require_choice("mtp", self, "auxiliary_ratio", Literal["own", "main"])
        require_positive("mtp", self, "measure_every", "scale", "eps")
        require(math.isfinite(self.coefficient), "mtp.coefficient", self.coefficient, "finite")
        require(0 <= self.decay < 1, "mtp.decay", self.decay, "at least 0 and below 1")
        if self.bounds is not None:
            low, high = self.bounds
            require(low < high, "mtp.bounds", self.bounds, "(low, high) with low < high")


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
        require_positive("optimizer", self, "learning_rate", "eps", "clip_norm")
        require_not_negative("optimizer", self, "warmup_steps", "weight_decay")
        require(0 <= self.b1 < 1, "optimizer.b1", self.b1, "at least 0 and below 1")
        require(0 <= self.b2 < 1, "optimizer.b2", self.b2, "at least 0 and below 1")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices used."""

    data: int = 1
    """Copies of the parameters; rows are split over them."""
    fsdp: int = 1
    """Parts that parameters and rows are split into."""
    tensor: int = 1
    """Parts of heads, feed-forward width and vocabulary."""
    expert: int = 1
    """Parts of a mixture's experts; rows and all other parameters are split over them as well."""

    def __post_init__(self) -> None:
        require_positive("mesh", self, "data", "fsdp", "tensor", "expert")

    @property
    def row_shards(self) -> int:
        """Parts that the rows of a batch are split into."""
        return self.data * self.fsdp * self.expert


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
    """How many of the newest are kept; one more while the next is being written."""
    keep_every: int = 0
    """Checkpoints of steps that this divides are kept for good; 0 for none."""
    max_skipped_updates: int = 10
    """Consecutive updates with a non-finite loss or gradient before training stops."""
    num_logged_samples: int = 2
    """Completions written to samples.jsonl each step."""
    wandb_project: str = ""
    """Weights & Biases project that metrics also go to (docs/metrics.md); "" for none."""

    def __post_init__(self) -> None:
        require_positive(
            "run",
            self,
            *("steps", "evaluate_every", "evaluation_prompts", "evaluation_samples"),
            *("checkpoint_every", "keep_checkpoints", "max_skipped_updates"),
        )
        require(0 <= self.seed < 2**31, "run.seed", self.seed, "between 0 and 2^31 - 1")
        require_not_negative("run", self, "num_logged_samples", "keep_every")
        require(bool(self.directory), "run.directory", self.directory, "a path")


@dataclass(frozen=True)
class Config:
    """One experiment."""

    task: TaskConfig = field(default_factory=TaskConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        prompts, updates = self.rollout.num_prompts, self.algorithm.updates_per_rollout
        require(
            prompts % updates == 0,
            "rollout.num_prompts",
            prompts,
            f"a multiple of algorithm.updates_per_rollout ({updates})",
        )
        micro = self.algorithm.micro_batches
        require(
            (prompts // updates) % micro == 0,
            "algorithm.micro_batches",
            micro,
            f"a divisor of the {prompts // updates} prompts of a mini-batch "
            "(groups are never split)",
        )
        shards = self.mesh.row_shards
        rows = prompts // updates // micro * self.rollout.group_size
        require(
            rows % shards == 0 and prompts % shards == 0,
            "rollout.num_prompts",
            prompts,
            f"such that prompts, and the {rows} rows of a micro-batch, divide over the "
            f"{shards} places of mesh.data, mesh.fsdp and mesh.expert",
        )
        chunks = self.rollout.sampling_chunks
        require(
            prompts % chunks == 0 and prompts // chunks % shards == 0,
            "rollout.sampling_chunks",
            chunks,
            f"such that it divides rollout.num_prompts ({prompts}), and a chunk the {shards} "
            "places of mesh.data, mesh.fsdp and mesh.expert",
        )
        _require_mesh_divides(self.mesh, self.model)
        _require_dataset_fits(self)
        occ = self.mtp.regime == "occ"
        require(
            self.model.num_mtp_modules > 0 or self.mtp.regime == "detach",
            "model.num_mtp_modules",
            self.model.num_mtp_modules,
            f"1 or more with mtp.regime {self.mtp.regime}",
        )
        require(
            not (occ and self.mtp.estimator == "cross_batch" and micro < 2),
            "algorithm.micro_batches",
            micro,
            "2 or more with mtp.estimator cross_batch",
        )
        require(
            not (occ and self.mtp.estimator == "log_prob" and updates < 2),
            "algorithm.updates_per_rollout",
            updates,
            "2 or more with mtp.estimator log_prob (the first update after a rollout has "
            "theta = theta_old and measures nothing)",
        )
        require(
            self.algorithm.rollout_correction_cap is None
            or self.rollout.old_log_probs == "trainer",
            "algorithm.rollout_correction_cap",
            self.algorithm.rollout_correction_cap,
            "None with rollout.old_log_probs sampler, whose weights are all 1",
        )
        require(
            self.algorithm.overlong_buffer_tokens <= self.rollout.max_new_tokens,
            "algorithm.overlong_buffer_tokens",
            self.algorithm.overlong_buffer_tokens,
            f"at most rollout.max_new_tokens ({self.rollout.max_new_tokens})",
        )


def _require_mesh_divides(mesh: MeshConfig, model: ModelConfig) -> None:
    """Refuses axes that would leave a large parameter, or a cache, in one piece."""
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
    shared = math.gcd(*tensor.values())
    fit = ", ".join(str(size) for size in range(1, shared + 1) if shared % size == 0)
    sizes = ", ".join(f"model.{name} {size}" for name, size in tensor.items())
    allowed = f"one of {fit}, the divisors of {sizes}"
    require(shared % mesh.tensor == 0, "mesh.tensor", mesh.tensor, allowed)
    for name, size in stored.items():
        places = mesh.fsdp * mesh.expert
        allowed = f"such that mesh.fsdp x mesh.expert ({places}) divides model.{name} ({size})"
        require(size % places == 0, "mesh.fsdp", mesh.fsdp, allowed)
    if mesh.expert > 1:
        allowed = "1 for a model without experts (model.moe)"
        require(moe is not None, "mesh.expert", mesh.expert, allowed)
        assert moe is not None
        allowed = f"a divisor of model.moe.num_experts ({moe.num_experts})"
        require(moe.num_experts % mesh.expert == 0, "mesh.expert", mesh.expert, allowed)


def _require_dataset_fits(config: Config) -> None:
    """What prepared problems ask of the other sections."""
    name = config.dataset.name
    if not name:
        return
    width, steps = config.rollout.max_prompt_tokens, config.warm_start.steps
    require(width > 0, "rollout.max_prompt_tokens", width, f"positive with dataset.name {name}")
    require(
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
        given[name] = _frozen(value)
    return kind(**given)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


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
        reward=RewardConfig(),
        run=RunConfig(),
    )
