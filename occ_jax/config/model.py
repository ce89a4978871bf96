"""What a model is made of, as frozen dataclasses that refuse bad values at construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from occ_jax.config.checks import require, require_choice, require_not_negative, require_positive

DType = Literal["float32", "bfloat16"]
AttentionKernel = Literal["auto", "plain", "cudnn", "splash"]


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
        require_positive(
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
        require_positive("model.latent_attention", self, *names)
        require_not_negative("model.latent_attention", self, "query_rank")
        require(
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
        require_positive(
            "model.delta_net",
            self,
            *("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim"),
            *("full_attention_interval", "chunk_size"),
        )
        require(self.conv_width >= 2, "model.delta_net.conv_width", self.conv_width, "2 or more")
        require(
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
        require_positive(
            "model.moe",
            self,
            *("num_experts", "experts_per_token", "intermediate_size", "weight_scale"),
            *("num_groups", "groups_per_token"),
        )
        require_not_negative("model.moe", self, "shared_intermediate_size", "first_dense_layers")
        require_choice("model.moe", self, "router", Literal["sigmoid", "softmax"])
        require(
            self.experts_per_token <= self.num_experts,
            "model.moe.experts_per_token",
            self.experts_per_token,
            f"at most model.moe.num_experts ({self.num_experts})",
        )
        require(
            self.num_experts % self.num_groups == 0,
            "model.moe.num_groups",
            self.num_groups,
            f"a divisor of model.moe.num_experts ({self.num_experts})",
        )
        require(
            self.num_groups == 1 or self.router == "sigmoid",
            "model.moe.num_groups",
            self.num_groups,
            "1 with model.moe.router softmax",
        )
        reachable = self.groups_per_token * (self.num_experts // self.num_groups)
        require(
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
    attention_kernel: AttentionKernel = "auto"
    """Of whole sequences: splash on TPUs, cudnn on GPUs for bfloat16, plain elsewhere; auto takes
    that of the mesh's devices. Decoding against a cache is always plain."""
    attention_columns: int = 0
    """Query columns whose scores exist at once where attention is plain; 0 for all of them."""
    logits_columns: int = 0
    """Response columns whose logits over the vocabulary exist at once; 0 for all of them."""

    def __post_init__(self) -> None:
        require_positive(
            "model",
            self,
            *("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
            *("intermediate_size", "vocab_size", "rope_theta", "rms_norm_eps"),
        )
        require_not_negative(
            "model", self, "num_mtp_modules", "attention_columns", "logits_columns"
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of model.num_heads ({self.num_heads})",
        )
        require(0 < self.rope_fraction <= 1, "model.rope_fraction", self.rope_fraction, "in (0, 1]")
        rotated = self.head_dim * self.rope_fraction
        require(
            rotated == int(rotated) and rotated % 2 == 0,
            "model.head_dim",
            self.head_dim,
            f"such that the {rotated:g} dimensions that RoPE turns are even",
        )
        require_choice("model", self, "mtp_concat", Literal["embed_hidden", "hidden_embed"])
        require_choice("model", self, "mtp_trunk_hidden", Literal["post_norm", "pre_norm"])
        require_choice("model", self, "param_dtype", DType)
        require_choice("model", self, "dtype", DType)
        require_choice("model", self, "remat", Literal["none", "dots", "full"])
        require_choice("model", self, "attention_kernel", AttentionKernel)
        require(
            self.attention_kernel != "cudnn" or self.dtype == "bfloat16",
            "model.attention_kernel",
            self.attention_kernel,
            "auto, plain or splash with model.dtype float32",
        )
        if self.moe is not None:
            require(
                self.moe.first_dense_layers <= self.num_layers,
                "model.moe.first_dense_layers",
                self.moe.first_dense_layers,
                f"at most model.num_layers ({self.num_layers})",
            )
            require(
                all(0 <= number < self.num_layers for number in self.moe.dense_layers),
                "model.moe.dense_layers",
                self.moe.dense_layers,
                f"numbers of layers, below model.num_layers ({self.num_layers})",
            )
