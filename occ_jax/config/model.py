"""The model's architecture, as frozen dataclasses that refuse bad values when they are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from occ_jax.config.checks import Bound, NonNegativeInt, PositiveFloat, PositiveInt, Section
from occ_jax.config.facts import COST_ONLY, Fact, setting

DType = Literal["float32", "bfloat16"]
AttentionKernel = Literal["auto", "plain", "cudnn", "splash"]
ConcatOrder = Literal["embed_hidden", "hidden_embed"]
TrunkHidden = Literal["post_norm", "pre_norm"]


@dataclass(frozen=True)
class YarnConfig(Section, path="model.yarn"):
    """Longer contexts by interpolation of RoPE's low frequencies (YaRN, arXiv 2309.00071)."""

    factor: PositiveFloat = 40.0
    """Ratio of the extended context length to the original one."""
    original_max_positions: PositiveInt = 4096
    """Original context length in tokens."""
    beta_fast: PositiveFloat = 32.0
    """Dimensions that turn more often than this over the original context stay as they are."""
    beta_slow: PositiveFloat = 1.0
    """Dimensions that turn less often than this over the original context are interpolated."""
    attention_factor: PositiveFloat = 1.0
    """Factor on sines and cosines."""
    softmax_factor: PositiveFloat = 1.0
    """Factor on the softmax scale (DeepSeek-V3: the square of its mscale)."""
    truncate: bool = True
    """Round the limits of the interpolated range to whole dimensions."""


@dataclass(frozen=True)
class LatentAttentionConfig(Section, path="model.latent_attention"):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    query_rank: NonNegativeInt = 1536
    """Width of the compressed query; 0 projects queries without compression."""
    kv_rank: PositiveInt = 512
    """Width of the compressed keys and values, which the cache holds."""
    nope_head_dim: PositiveInt = 128
    """Dimensions of a head's queries and keys that RoPE does not rotate."""
    rope_head_dim: PositiveInt = 64
    """Dimensions of a head's queries and keys that RoPE rotates; these keys are the same in all
    heads."""
    value_head_dim: PositiveInt = 128
    """Dimensions of a head's values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.rope_head_dim % 2 == 0, "rope_head_dim", "even (RoPE)")


@dataclass(frozen=True)
class DeltaNetConfig(Section, path="model.delta_net"):
    """Gated delta-net layers between full-attention layers (arXiv 2412.06464; Qwen3-Next)."""

    num_key_heads: PositiveInt = 16
    num_value_heads: PositiveInt = 32
    key_head_dim: PositiveInt = 128
    value_head_dim: PositiveInt = 128
    conv_width: Annotated[int, Bound("2 or more", lambda x: x >= 2)] = 4
    """Tokens that the causal convolution reads."""
    full_attention_interval: PositiveInt = 4
    """Every n-th layer has full attention; the others are delta-net layers."""
    chunk_size: PositiveInt = setting(64, Fact.SAME_WARM_UP)
    """Tokens that one matrix product processes; no effect on the result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.num_value_heads % self.num_key_heads == 0,
            "num_key_heads",
            f"a divisor of model.delta_net.num_value_heads ({self.num_value_heads})",
        )


@dataclass(frozen=True)
class MoEConfig(Section, path="model.moe"):
    """Mixture-of-experts feed-forward layers, no token dropped (DeepSeek-V3, arXiv 2412.19437)."""

    num_experts: PositiveInt = 128
    experts_per_token: PositiveInt = 8
    intermediate_size: PositiveInt = 1408
    """Width of one routed expert."""
    shared_intermediate_size: NonNegativeInt = 1408
    """Width of the expert that every token passes; 0 for no such expert."""
    shared_gate: bool = False
    """Scale the shared expert with a sigmoid gate (Qwen3-Next)."""
    router: Literal["sigmoid", "softmax"] = "sigmoid"
    """sigmoid chooses experts by score plus correction bias and weights them by score; softmax does
    both by probability."""
    normalize_weights: bool = True
    """Divide the weights of the chosen experts by their sum."""
    weight_scale: PositiveFloat = 1.0
    """Factor on the weights of the routed experts."""
    num_groups: PositiveInt = 1
    """Groups that the experts are divided into; more than 1 with the sigmoid router only."""
    groups_per_token: PositiveInt = 1
    """Groups that a token's experts are chosen from (node-limited routing)."""
    first_dense_layers: NonNegativeInt = 0
    """Layers before the first mixture-of-experts layer."""
    dense_layers: tuple[int, ...] = ()
    """Numbers of further layers without experts (Qwen3-Next's config allows them)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.experts_per_token <= self.num_experts,
            "experts_per_token",
            f"at most model.moe.num_experts ({self.num_experts})",
        )
        self.require(
            self.num_experts % self.num_groups == 0,
            "num_groups",
            f"a divisor of model.moe.num_experts ({self.num_experts})",
        )
        self.require(
            self.num_groups == 1 or self.router == "sigmoid",
            "num_groups",
            "1 with model.moe.router softmax",
        )
        reachable = self.groups_per_token * (self.num_experts // self.num_groups)
        self.require(
            self.groups_per_token <= self.num_groups and self.experts_per_token <= reachable,
            "groups_per_token",
            f"at most model.moe.num_groups ({self.num_groups}), and enough for "
            f"{self.experts_per_token} experts",
        )


@dataclass(frozen=True)
class ModelConfig(Section, path="model"):
    """A decoder with sequential MTP modules (`occ_jax.models`), composed of parts.

    A layer's mixer is attention, latent attention or a delta net; its feed-forward part is dense or
    a mixture of experts. A Hugging Face directory in `checkpoint` decides the architecture
    (`occ_jax.models.huggingface`); the fields of the last group stay free.
    """

    checkpoint: str = ""
    """Hugging Face directory with architecture, starting parameters and tokenizer; "" for none."""

    hidden_size: PositiveInt = 64
    num_layers: PositiveInt = 2
    """Layers of the trunk."""
    num_heads: PositiveInt = 4
    """Query heads of a layer."""
    num_kv_heads: PositiveInt = 4
    """Key-value heads of a layer."""
    head_dim: PositiveInt = 16
    """Dimensions of a head's queries, keys and values."""
    intermediate_size: PositiveInt = 192
    """Width of the dense feed-forward layers."""
    vocab_size: PositiveInt = 16
    """Rows of the token embedding; at least the tokenizer's size."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of RoPE's frequencies."""
    rope_fraction: Annotated[float, Bound("in (0, 1]", lambda x: 0 < x <= 1)] = 1.0
    """Share of a head's dimensions, from the first, that are rotated (GLM-4.5: 0.5)."""
    yarn: YarnConfig | None = None
    rms_norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in RMSNorm."""
    zero_centered_norm: bool = False
    """Norms multiply by 1 + scale instead of scale (Qwen3-Next)."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2, GLM-4.5)."""
    qk_norm: bool = False
    """RMSNorm of queries and keys per head, before RoPE (Qwen3)."""
    attention_gate: bool = False
    """Sigmoid gate on the output of every head, before the output projection (Qwen3-Next)."""
    tie_embeddings: bool = False
    """The output head uses the weights of the token embedding."""
    latent_attention: LatentAttentionConfig | None = None
    delta_net: DeltaNetConfig | None = None
    moe: MoEConfig | None = None
    num_mtp_modules: NonNegativeInt = 1
    """K: module k predicts the token k+1 positions ahead."""
    mtp_concat: ConcatOrder = "embed_hidden"
    """Order of the projection's input: hidden_embed for MiMo, otherwise embed_hidden."""
    mtp_trunk_hidden: TrunkHidden = "post_norm"
    """Trunk state that module 1 reads: after or before the trunk's final norm."""

    param_dtype: DType = setting("float32", Fact.NOT_IN_CHECKPOINT)
    """Type of the parameters."""
    dtype: DType = setting("float32", Fact.NOT_IN_CHECKPOINT | Fact.SAME_MODEL)
    """Type of activations and matrix products; norms, softmax, routers and losses are float32."""
    scan_layers: bool = setting(False, Fact.NOT_IN_CHECKPOINT)
    """Compile one layer and scan over all of them, so that deep models compile faster."""
    remat: Literal["none", "dots", "full"] = setting("none", COST_ONLY)
    """Recomputed by the backward pass: nothing, all but matrix products, or whole layers."""
    attention_kernel: AttentionKernel = setting("auto", COST_ONLY)
    """Attention of whole sequences: splash on TPUs, cudnn on GPUs for bfloat16, plain elsewhere;
    auto chooses by the mesh's devices. Decoding with a cache is always plain."""
    attention_columns: NonNegativeInt = setting(0, COST_ONLY)
    """Query columns whose attention scores are in memory at once (plain kernel); 0 for all."""
    logits_columns: NonNegativeInt = setting(0, COST_ONLY)
    """Response columns whose logits are in memory at once; 0 for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            f"a divisor of model.num_heads ({self.num_heads})",
        )
        rotated = self.head_dim * self.rope_fraction
        self.require(
            rotated == int(rotated) and rotated % 2 == 0,
            "head_dim",
            f"such that the {rotated:g} dimensions that RoPE turns are even",
        )
        self.require(
            self.attention_kernel != "cudnn" or self.dtype == "bfloat16",
            "attention_kernel",
            "auto, plain or splash with model.dtype float32",
        )
        if self.moe is not None:
            self.require(
                self.moe.first_dense_layers <= self.num_layers,
                "moe.first_dense_layers",
                f"at most model.num_layers ({self.num_layers})",
            )
            self.require(
                all(0 <= number < self.num_layers for number in self.moe.dense_layers),
                "moe.dense_layers",
                f"numbers of layers, below model.num_layers ({self.num_layers})",
            )
