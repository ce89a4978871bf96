"""The interface of the model: pure functions of a plain parameter tree.

Flax NNX defines the layers. Here they are split, once, into static graph definitions and a nested
dictionary of arrays, {"trunk": θ, "mtp": {0: φ_1, ...}}. Code outside `models/` calls only
`jax.jit`, `jax.grad` and `jax.vjp` on functions of that dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from occ_jax.config import ModelConfig
from occ_jax.models.attention import Columns
from occ_jax.models.decoder import (
    Cache,
    embedding_and_head,
    graph,
    init_module,
    init_trunk,
    output_head,
    read_head,
    run_segment,
)
from occ_jax.models.layers import whole_tiles
from occ_jax.models.mtp import MTPModule
from occ_jax.models.transformer import BlockOutput, LayerCache, segments
from occ_jax.parallel.sharding import gather_weights
from occ_jax.types import Params


class TrunkOutput(NamedTuple):
    """Result of `Model.trunk`."""

    hidden: Float[Array, "B T D"]  # after the final norm: input of the output head
    mtp_input: Float[Array, "B T D"]  # input of the first MTP module
    cache: list[tuple[LayerCache, ...]]
    experts: list[Int[Array, "repeats B T k"]]  # for each MoE layer, the experts of every token


class ModelOutput(NamedTuple):
    """Result of `Model.apply`."""

    logits: Float[Array, "B T V"]  # float32; column i predicts the token in column i+1
    hidden: Float[Array, "B T D"]  # input of the first MTP module
    mtp_logits: list[Array]  # float32 [B, T-k, V] for k = 1...: slot i predicts column i+k+1


@dataclass(frozen=True)
class Model:
    """The architecture without its parameters; hashable, so it may be a static argument."""

    config: ModelConfig

    def init(self, key: Key[Array, ""]) -> Params:
        """Random parameters, {"trunk": θ, "mtp": {0: φ_1, ...}}.

        The modules have their own keys, so the trunk is the same for every K.
        """
        trunk_key, mtp_key = jax.random.split(key)
        return {
            "trunk": init_trunk(self.config, trunk_key),
            "mtp": {
                k: init_module(MTPModule, self.config, jax.random.fold_in(mtp_key, k))
                for k in range(self.config.num_mtp_modules)
            },
        }

    def trunk(
        self,
        theta: Params,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B S"],
        cache: Cache | None = None,
        index: Int[Array, ""] | int = 0,
    ) -> TrunkOutput:
        """Runs the trunk over T columns: embedding, layers, final norm.

        Without a cache, the columns attend to each other (S = T). With a cache, they are written to
        its columns `index` ... `index`+T-1 and attend to every column up to their own.

        Args:
            theta: the parameters under "trunk".
            tokens: int32 token ids.
            positions: int32 position of each column in its own row, 0 for the first real token.
            valid: which of the S key columns hold a real token.
            cache: from an earlier call, with room made by `occ_jax.models.cache.extend`.
            index: the first column that is written.
        """
        config, columns = self.config, Columns(positions, valid, index)
        outer = embedding_and_head(config, theta)
        x = outer.embeddings(tokens)
        new_cache: list[tuple[LayerCache, ...]] = []
        experts: list[Array] = []
        for number, segment in enumerate(segments(config)):
            layers, before = theta["layers"][number], None if cache is None else cache[number]
            x, after, chosen = run_segment(config, segment, layers, x, columns, before)
            new_cache.append(after)
            experts += chosen
        hidden = outer.final_norm(x)
        mtp_input = x if config.mtp_trunk_hidden == "pre_norm" else hidden
        return TrunkOutput(hidden, mtp_input, new_cache, experts)

    def logits(self, theta: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Applies the output head to states after a final norm; float32."""
        return read_head(self.config, output_head(self.config, theta)[None], hidden)

    def embed(self, theta: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The token embedding that the trunk and the MTP modules read."""
        return embedding_and_head(self.config, theta).embeddings(tokens)

    def mtp_module(
        self,
        phi: Params,
        hidden: Float[Array, "B T D"],
        embeddings: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B S"],
        cache: LayerCache | None = None,
        index: Int[Array, ""] | int = 0,
    ) -> BlockOutput:
        """Runs one MTP module over T slots; `occ_jax.models.mtp` defines a slot.

        Args:
            phi: the parameters of one module.
            hidden: for each slot, the trunk's state or the previous module's output.
            embeddings: for each slot, the embedding of the token k columns ahead.
            positions: int32 position of each slot.
            valid: which of the S key slots have a real state and a real token.
            cache: from an earlier call, with room made by `occ_jax.models.cache.extend`.
            index: the first slot that is written.
        """
        weights = gather_weights(phi, self.config.dtype)
        module = nnx.merge(graph(MTPModule, self.config), weights)
        return module(hidden, embeddings, Columns(positions, valid, index), cache)

    def mtp_states(
        self,
        params: Params,
        mtp_input: Float[Array, "B T D"],
        tokens: Int[Array, "B T+1"],
        positions: Int[Array, "B T"],
        valid: Bool[Array, "B T+1"],
        depth: int,
    ) -> list[Array]:
        """Outputs of the modules at depths 1 ... depth over a whole sequence.

        The last slot of depth k reads the last token. Gradients flow between depths. The caller
        stops other gradients in what it passes as `params` and `mtp_input`.

        Args:
            params: trunk (only its embedding is read) and modules.
            mtp_input: the trunk's states, without the last column.
            tokens: all columns.
            positions: without the last column.
            valid: all columns.
            depth: number of outputs. After depth K the modules repeat from the first one, as in
                speculative decoding with more drafts than modules.

        Returns:
            [B, T+1-k, D] at depth k.
        """
        embeddings = self.embed(params["trunk"], whole_tiles(tokens))
        states: list[Array] = []
        hidden = mtp_input
        for k in range(1, depth + 1):
            slots = mtp_input.shape[1] + 1 - k
            arrays = (
                hidden[:, :slots],
                embeddings[:, k : k + slots],
                positions[:, :slots],
                # A slot is real if the state and the token that it reads are both real.
                valid[:, :slots] & valid[:, k : k + slots],
            )
            phi = params["mtp"][(k - 1) % self.config.num_mtp_modules]
            states_in, ahead, at, real = map(whole_tiles, arrays)
            hidden = self.mtp_module(phi, states_in, ahead, at, real).x[:, :slots]
            states.append(hidden)
        return states

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"] | Sequence[int] | None = None,
        mtp_depth: int | None = None,
    ) -> ModelOutput:
        """Computes all logits of right-padded sequences, for inspection and tests.

        Args:
            params: from `init` or a checkpoint.
            tokens: int32, padded on the right.
            lengths: number of real tokens of each row; None for no padding. The outputs of padding
                are undefined.
            mtp_depth: number of MTP outputs; None for K. After K the modules repeat.

        Raises:
            ValueError: `mtp_depth` is negative, or positive where there are no modules.
        """
        depth = self.config.num_mtp_modules if mtp_depth is None else mtp_depth
        if depth < 0 or (depth > 0 and self.config.num_mtp_modules == 0):
            raise ValueError(
                f"mtp_depth is {depth}; this model has {self.config.num_mtp_modules} MTP modules"
            )
        tokens = jnp.asarray(tokens, jnp.int32)
        rows, columns = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(columns), (rows, columns))
        real_tokens = jnp.full(rows, columns) if lengths is None else jnp.asarray(lengths)
        valid = positions < real_tokens[:, None]
        trunk = self.trunk(params["trunk"], tokens, positions, valid)
        states = self.mtp_states(
            params, trunk.mtp_input[:, :-1], tokens, positions[:, :-1], valid, depth
        )
        return ModelOutput(
            logits=self.logits(params["trunk"], trunk.hidden),
            hidden=trunk.mtp_input,
            mtp_logits=[self.logits(params["trunk"], state) for state in states],
        )


def num_parameters(params: Params) -> int:
    """Number of scalars in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
