"""The model as the rest of the package sees it: pure functions of a plain parameter tree.

Flax NNX defines the modules and is split once, here, into static graph definitions and a nested
dictionary of arrays, {"trunk": theta, "mtp": {0: phi_1, ...}}. Outside `models/` only `jax.jit`,
`jax.grad` and `jax.vjp` on that dictionary are used.
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
    TrunkOutput,
    ends,
    graph,
    init_module,
    init_trunk,
    output_head,
    read_head,
    run_trunk,
)
from occ_jax.models.layers import whole_tiles
from occ_jax.models.mtp import MTPModule
from occ_jax.models.transformer import BlockOutput, LayerCache
from occ_jax.parallel.sharding import gathered
from occ_jax.types import Params


class ModelOutput(NamedTuple):
    """What `Model.apply` returns."""

    logits: Float[Array, "B T V"]  # float32; column i predicts the token in column i+1
    hidden: Float[Array, "B T D"]  # what enters the first MTP module
    mtp_logits: list[Array]  # float32 [B, T-k, V] for k = 1...: slot i predicts column i+k+1


@dataclass(frozen=True)
class Model:
    """A hashable handle: the architecture without its parameters."""

    config: ModelConfig

    def init(self, key: Key[Array, ""]) -> Params:
        """Random parameters, {"trunk": theta, "mtp": {0: phi_1, ...}}.

        The modules draw from keys of their own, so the trunk is the same whatever K is.
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
        """Trunk over T columns.

        Without a cache the columns attend among themselves (S = T). With one they are written at
        columns `index` ... `index`+T-1 and attend to every column of the cache up to their own.

        Args:
            theta: the parameters under "trunk".
            tokens: int32 token ids.
            positions: int32 position of each column in its own row, 0 for the first real token.
            valid: which of the S key columns hold a real token.
            cache: of an earlier call, room made by `occ_jax.models.cache.extend`.
            index: the first column written.
        """
        return run_trunk(self.config, theta, tokens, Columns(positions, valid, index), cache)

    def logits(self, theta: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The output head on states after a final norm, float32."""
        return read_head(self.config, output_head(self.config, theta)[None], hidden)

    def embed(self, theta: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The token embedding, as the trunk and the MTP modules read it."""
        return ends(self.config, theta).embeddings(tokens)

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
        """One MTP module over T slots (module docstring of `occ_jax.models.mtp`).

        Args:
            phi: the parameters of one module.
            hidden: trunk state, or the previous module's output, of each slot.
            embeddings: of the token k columns ahead of each slot.
            positions: int32 position of each slot.
            valid: which of the S key slots hold real tokens on both sides.
            cache: of an earlier call, room made by `occ_jax.models.cache.extend`.
            index: the first slot written.
        """
        phi = gathered(phi, self.config.dtype)
        module = nnx.merge(graph(MTPModule, self.config), phi)
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
        """Outputs at depths 1 ... depth over a whole sequence, [B, T+1-k, D] at depth k.

        The last slot of depth k reads the last token. Gradients flow between depths; where they
        stop otherwise is decided by what the caller passes as `params` and `mtp_input`.

        Args:
            params: trunk (its embedding is read) and modules.
            mtp_input: the trunk's states, all columns but the last.
            tokens: all columns.
            positions: of all columns but the last.
            valid: of all columns.
            depth: how far ahead; beyond K the modules take turns again from the first, as
                drafters with fewer modules than drafts do.
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
                # A slot is real when both the state and the token it reads are.
                valid[:, :slots] & valid[:, k : k + slots],
            )
            phi = params["mtp"][(k - 1) % self.config.num_mtp_modules]
            states_in, ahead, places, real = map(whole_tiles, arrays)
            hidden = self.mtp_module(phi, states_in, ahead, places, real).x[:, :slots]
            states.append(hidden)
        return states

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        lengths: Int[Array, " B"] | Sequence[int] | None = None,
        mtp_depth: int | None = None,
    ) -> ModelOutput:
        """All logits of right-padded sequences, for inspection and tests.

        Args:
            params: from `init` or a checkpoint.
            tokens: int32, padded on the right.
            lengths: real tokens of each row; None for no padding. Outputs beyond them are
                meaningless.
            mtp_depth: how far ahead to predict; None for K. Beyond K the modules take turns.

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
        ends = jnp.full(rows, columns) if lengths is None else jnp.asarray(lengths)
        valid = positions < ends[:, None]
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
    """Scalars in a parameter tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
