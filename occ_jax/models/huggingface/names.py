"""The published tensors of a model and the parameters that each holds, for loading and saving.

A published tensor consists of one or more pieces. A piece is a set of the tensor's rows (its output
dimension) and the parameter that holds them. The pieces of a tensor partition its rows, so the same
list serves for reading and for writing. A new family with known parts needs a `TensorNames`; a new
part needs a generator of `_Part`s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from occ_jax.config import ModelConfig, MoEConfig
from occ_jax.models.transformer import LayerKind, mtp_kind, segments

RowIndex = slice | np.ndarray
LeafPath = tuple[str | int, ...]

_Pieces = tuple[tuple[str, RowIndex], ...]  # paths within a block, and rows
_T = TypeVar("_T")

EVERY = slice(None)


@dataclass(frozen=True)
class TensorLayout:
    """The order of a published tensor's dimensions, relative to its parameter's."""

    transposed: bool = False
    """Whether it is [..., out, in] for a parameter [..., in, out]."""
    extra_axis: bool = False
    """Whether it has an axis of size 1 after its first: [channels, 1, width]."""

    def published(self, dims: tuple[_T, ...]) -> tuple[_T, ...]:
        """Sizes (or partitions) of a parameter's dimensions in the tensor's order."""
        return (*dims[:-2], dims[-1], dims[-2]) if self.transposed else dims

    def rows_axis(self, ndim: int) -> int:
        """The tensor's axis of rows, which its pieces partition; the extra axis does not count."""
        return ndim - 2 if self.transposed else 0


PLAIN = TensorLayout()
MATRIX = TensorLayout(transposed=True)
CONVOLUTION = TensorLayout(transposed=True, extra_axis=True)


class Piece(NamedTuple):
    """Some rows of a published tensor, and the parameter that holds them."""

    path: LeafPath  # of the parameter
    index: tuple[int, ...]  # into its leading axes: repeat, expert
    rows: RowIndex


class Stored(NamedTuple):
    """A published tensor."""

    name: str
    layout: TensorLayout
    pieces: tuple[Piece, ...]
    copy_of: str = ""
    """Name of the tensor that this one repeats; loading compares the two, saving writes both."""


@dataclass(frozen=True)
class TensorNames:
    """A family's names; {k} is the number of an MTP module, {layer} is {k} plus all layers."""

    trunk: str = "model."
    """Prefix of embed_tokens, layers and norm."""
    module: str = ""
    """Prefix of a module's norms and projection; "" for a family without modules."""
    module_block: str = ""
    """Prefix of the tensors of a module's block."""
    embed_norm: str = ""
    hidden_norm: str = ""
    projection: str = ""
    final_norm: str = ""
    module_embedding: str = ""
    module_head: str = ""
    """A module's copies of embedding and head; "" if the family does not repeat them."""
    shared_expert: str = "shared_experts"
    fused_delta_net: bool = False
    """Whether the delta net's projections are stored as two, interleaved by key head."""
    others: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)
    """Patterns of tensors that no model of this package holds."""


class _Part(NamedTuple):
    """A published tensor of a block: names and paths within the block."""

    name: str
    layout: TensorLayout
    pieces: _Pieces
    expert: int | None = None


def published_tensors(
    config: ModelConfig, names: TensorNames, num_modules: int, present: Collection[str]
) -> Iterator[Stored]:
    """Every published tensor of a model; copies come last.

    Args:
        config: the model; it holds `num_mtp_modules` modules.
        names: of the family.
        num_modules: number of modules in the checkpoint; the copies of all of them are included.
        present: names of the checkpoint's tensors. They decide whether experts are fused and
            whether there are copies, which some exporters leave out.
    """
    table = (_whole("trunk", "embed", "embedding"),)
    embedding = Stored(f"{names.trunk}embed_tokens.weight", PLAIN, table)
    head = Stored("lm_head.weight", MATRIX, (_whole("trunk", "head", "kernel"),))
    yield embedding
    yield _norm(f"{names.trunk}norm", "trunk", "final_norm")
    if not config.tie_embeddings:
        yield head
    for number, (path, repeat, kind) in enumerate(_layers(config)):
        parts = _block(config, names, kind, f"{names.trunk}layers.{number}.", present)
        yield from _in_block(parts, f"{names.trunk}layers.{number}.", path, repeat)
    for k in range(config.num_mtp_modules):
        prefix, block = _module_prefixes(config, names, k)
        yield _norm(prefix + names.embed_norm, "mtp", k, "embed_norm")
        yield _norm(prefix + names.hidden_norm, "mtp", k, "hidden_norm")
        projection = (_whole("mtp", k, "projection", "kernel"),)
        yield Stored(f"{prefix}{names.projection}.weight", MATRIX, projection)
        yield _norm(prefix + names.final_norm, "mtp", k, "final_norm")
        parts = _block(config, names, mtp_kind(config), block, present)
        yield from _in_block(parts, block, ("mtp", k, "block"), None)
    head_of = embedding if config.tie_embeddings else head
    copies = [(head.name, head_of)] if config.tie_embeddings else []
    for k in range(num_modules if names.module_head else 0):
        prefix, _ = _module_prefixes(config, names, k)
        copies.append((f"{prefix}{names.module_embedding}.weight", embedding))
        copies.append((f"{prefix}{names.module_head}.weight", head_of))
    for name, original in copies:
        if name in present:
            yield original._replace(name=name, copy_of=original.name)


def left_out(config: ModelConfig, names: TensorNames, num_modules: int) -> tuple[str, ...]:
    """Prefixes of the modules that are in the checkpoint and not in the model."""
    missing = range(config.num_mtp_modules, num_modules)
    return tuple(prefix for k in missing for prefix in _module_prefixes(config, names, k))


def _module_prefixes(config: ModelConfig, names: TensorNames, k: int) -> list[str]:
    """Prefix of a module's norms and projection, and of its block."""
    layer = config.num_layers + k
    return [text.format(k=k, layer=layer) for text in (names.module, names.module_block)]


def _whole(*path: str | int) -> Piece:
    return Piece(path, (), EVERY)


def _norm(name: str, *path: str | int) -> Stored:
    return Stored(f"{name}.weight", PLAIN, (_whole(*path, "scale"),))


def _layers(config: ModelConfig) -> Iterator[tuple[LeafPath, int | None, LayerKind]]:
    """Path of every layer's block, its repeat if the leaves are stacked, and its kind."""
    for index, segment in enumerate(segments(config)):
        for repeat in range(segment.repeats):
            for offset, kind in enumerate(segment.pattern):
                stacked = repeat if segment.repeats > 1 else None
                yield ("trunk", "layers", index, offset), stacked, kind


def _in_block(
    parts: Iterator[_Part], prefix: str, path: LeafPath, repeat: int | None
) -> Iterator[Stored]:
    """The tensors of a block, with the names and paths of the whole model."""
    for part in parts:
        index = tuple(i for i in (repeat, part.expert) if i is not None)
        pieces = (Piece((*path, *leaf.split("/")), index, rows) for leaf, rows in part.pieces)
        yield Stored(prefix + part.name, part.layout, tuple(pieces))


def _block(
    config: ModelConfig, names: TensorNames, kind: LayerKind, prefix: str, present: Collection[str]
) -> Iterator[_Part]:
    yield _plain("input_layernorm.weight", "mixer_norm/scale")
    yield _plain("post_attention_layernorm.weight", "feed_forward_norm/scale")
    match kind.mixer:
        case "attention":
            yield from _attention(config)
        case "latent_attention":
            yield from _latent_attention(config)
        case "delta_net":
            yield from _delta_net(config, names.fused_delta_net)
    if kind.feed_forward == "dense":
        yield from _swiglu("mlp", "feed_forward")
    else:
        assert config.moe is not None
        yield from _experts(config.moe, f"{prefix}mlp.experts.gate_up_proj" in present)
        yield from _router(config.moe, names.shared_expert)


def _plain(name: str, leaf: str) -> _Part:
    return _Part(name, PLAIN, ((leaf, EVERY),))


def _linear(name: str, leaf: str) -> _Part:
    return _Part(f"{name}.weight", MATRIX, ((f"{leaf}/kernel", EVERY),))


def _swiglu(name: str, leaf: str) -> Iterator[_Part]:
    for part in ("gate", "up", "down"):
        yield _linear(f"{name}.{part}_proj", f"{leaf}/{part}")


def _attention(config: ModelConfig) -> Iterator[_Part]:
    query: _Pieces = (("query", EVERY),)
    if config.attention_gate:
        # For every head: query, gate.
        by_head = _grid(config.num_heads, 2, config.head_dim)
        query = (("query", by_head[:, 0].ravel()), ("gate", by_head[:, 1].ravel()))
    for short, pieces in (("q", query), ("k", (("key", EVERY),)), ("v", (("value", EVERY),))):
        kernels = tuple((f"mixer/{name}/kernel", rows) for name, rows in pieces)
        yield _Part(f"self_attn.{short}_proj.weight", MATRIX, kernels)
        if config.qkv_bias:
            biases = tuple((f"mixer/{name}/bias", rows) for name, rows in pieces)
            yield _Part(f"self_attn.{short}_proj.bias", PLAIN, biases)
    yield _linear("self_attn.o_proj", "mixer/output")
    if config.qk_norm:
        yield _plain("self_attn.q_norm.weight", "mixer/query_norm/scale")
        yield _plain("self_attn.k_norm.weight", "mixer/key_norm/scale")


def _latent_attention(config: ModelConfig) -> Iterator[_Part]:
    latent = config.latent_attention
    assert latent is not None
    if latent.query_rank:
        yield _linear("self_attn.q_a_proj", "mixer/query_down")
        yield _plain("self_attn.q_a_layernorm.weight", "mixer/query_norm/scale")
    yield _linear("self_attn.q_b_proj" if latent.query_rank else "self_attn.q_proj", "mixer/query")
    compressed = (
        ("mixer/latent_down/kernel", slice(0, latent.kv_rank)),
        ("mixer/shared_key/kernel", slice(latent.kv_rank, latent.kv_rank + latent.rope_head_dim)),
    )
    yield _Part("self_attn.kv_a_proj_with_mqa.weight", MATRIX, compressed)
    yield _plain("self_attn.kv_a_layernorm.weight", "mixer/latent_norm/scale")
    by_head = _grid(config.num_heads, latent.nope_head_dim + latent.value_head_dim)
    expanded = (
        ("mixer/key/kernel", by_head[:, : latent.nope_head_dim].ravel()),
        ("mixer/value/kernel", by_head[:, latent.nope_head_dim :].ravel()),
    )
    yield _Part("self_attn.kv_b_proj.weight", MATRIX, expanded)
    yield _linear("self_attn.o_proj", "mixer/output")


def _delta_net(config: ModelConfig, fused: bool) -> Iterator[_Part]:
    net = config.delta_net
    assert net is not None
    if fused:
        # For every key head: query, key, then values and gates of its value heads.
        shared = net.num_value_heads // net.num_key_heads
        key, value = net.key_head_dim, shared * net.value_head_dim
        by_head = _grid(net.num_key_heads, 2 * key + 2 * value)
        parts = np.split(by_head, [key, 2 * key, 2 * key + value], axis=1)
        qkv = np.concatenate([part.ravel() for part in parts[:3]])
        pieces = (("mixer/qkv/kernel", qkv), ("mixer/gate/kernel", parts[3].ravel()))
        yield _Part("linear_attn.in_proj_qkvz.weight", MATRIX, pieces)
        by_head = _grid(net.num_key_heads, 2, shared)
        pieces = (
            ("mixer/beta/kernel", by_head[:, 0].ravel()),
            ("mixer/decay/kernel", by_head[:, 1].ravel()),
        )
        yield _Part("linear_attn.in_proj_ba.weight", MATRIX, pieces)
    else:
        yield _linear("linear_attn.in_proj_qkv", "mixer/qkv")
        yield _linear("linear_attn.in_proj_z", "mixer/gate")
        yield _linear("linear_attn.in_proj_b", "mixer/beta")
        yield _linear("linear_attn.in_proj_a", "mixer/decay")
    yield _Part("linear_attn.conv1d.weight", CONVOLUTION, (("mixer/convolution", EVERY),))
    yield _plain("linear_attn.A_log", "mixer/log_rate")
    yield _plain("linear_attn.dt_bias", "mixer/decay_bias")
    yield _plain("linear_attn.norm.weight", "mixer/norm/scale")
    yield _linear("linear_attn.out_proj", "mixer/output")


def _experts(moe: MoEConfig, fused: bool) -> Iterator[_Part]:
    leaf, width = "feed_forward/experts", moe.intermediate_size
    if fused:
        pair = ((f"{leaf}/gate", slice(0, width)), (f"{leaf}/up", slice(width, 2 * width)))
        yield _Part("mlp.experts.gate_up_proj", MATRIX, pair)
        yield _Part("mlp.experts.down_proj", MATRIX, ((f"{leaf}/down", EVERY),))
        return
    for expert in range(moe.num_experts):
        for part in ("gate", "up", "down"):
            name, pieces = f"mlp.experts.{expert}.{part}_proj.weight", ((f"{leaf}/{part}", EVERY),)
            yield _Part(name, MATRIX, pieces, expert)


def _router(moe: MoEConfig, shared_expert: str) -> Iterator[_Part]:
    yield _linear("mlp.gate", "feed_forward/router")
    if moe.router == "sigmoid":
        yield _plain("mlp.gate.e_score_correction_bias", "feed_forward/router/correction_bias")
    if moe.shared_intermediate_size:
        yield from _swiglu(f"mlp.{shared_expert}", "feed_forward/shared")
    if moe.shared_gate:
        yield _linear("mlp.shared_expert_gate", "feed_forward/shared_gate")


def _grid(*shape: int) -> np.ndarray:
    """Row numbers in order, as an array of the given shape."""
    return np.arange(np.prod(shape)).reshape(shape)


def leaf_at(tree: Any, path: LeafPath) -> Any:
    """The leaf of a parameter tree."""
    for key in path:
        tree = tree[key]
    return tree


def stored_shape(stored: Stored, params: Any) -> tuple[int, ...]:
    """The shape that a published tensor must have, by parameters or their shapes."""
    shapes = [
        stored.layout.published(leaf_at(params, piece.path).shape[len(piece.index) :])
        for piece in stored.pieces
    ]
    shape, axis = [*shapes[0]], stored.layout.rows_axis(len(shapes[0]))
    shape[axis] = sum(shape[axis] for shape in shapes)
    return (shape[0], 1, *shape[1:]) if stored.layout.extra_axis else tuple(shape)
