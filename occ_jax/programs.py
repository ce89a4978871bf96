"""The jitted programs of a run, all made here, with one cache.

    sample -> split -> update, or update_between        training
    answer, completion_probability                      evaluation
    complete                                            generation

Runs that differ only in settings that compiled code does not depend on (seed, directory, length:
see `occ_jax.config.computation`) share their programs, as `occ_jax.training.compare` needs. The
computation itself is in the pure functions that a program wraps; here are jit, shardings and
donation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from occ_jax.config import Config, computation
from occ_jax.models.model import Model
from occ_jax.parallel.sharding import on_mesh, replicated, row_sharding, row_shardings
from occ_jax.rl.batches import replace_rows, split_rollout
from occ_jax.rl.regime import active_estimator, scores_modules
from occ_jax.rl.train_step import Metrics, abstract_state, train_step
from occ_jax.rollout.measures import agreement_counts, completion_probability
from occ_jax.rollout.sampler import on_sampling_mesh, sample, sample_in_chunks
from occ_jax.types import Batch, Params, Rollout, TrainState

_Update = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_programs(config: Config, mesh: Mesh, end_ids: tuple[int, ...], pad_id: int) -> Programs:
    """Returns the programs of a config on a mesh, the same ones for configs that compile alike.

    Args:
        config: the experiment.
        mesh: where parameters and rows lie.
        end_ids: tokens that end a completion.
        pad_id: fills the columns after the end.
    """
    return _make_programs(computation(config), mesh, end_ids, pad_id)


@functools.lru_cache(maxsize=16)
def _make_programs(config: Config, mesh: Mesh, end_ids: tuple[int, ...], pad_id: int) -> Programs:
    return Programs(config, mesh, end_ids, pad_id)


@dataclass(frozen=True)
class Programs:
    """One attribute a program; each is made when it is first asked for."""

    config: Config
    mesh: Mesh
    end_ids: tuple[int, ...]
    pad_id: int

    @property
    def model(self) -> Model:
        """The architecture that all programs are of."""
        return Model(self.config.model)

    @functools.cached_property
    def sample(self) -> Callable[..., Rollout]:
        """(params, prompts [P, columns], their validity, key) to a rollout of P·G rows."""
        options = self.config.rollout
        run = functools.partial(
            sample_in_chunks,
            options.sampling_chunks,
            self.model,
            group_size=options.group_size,
            auxiliary=scores_modules(self.config) and options.old_log_probs == "sampler",
            **self._sampling(options.temperature),
        )
        return jax.jit(
            on_sampling_mesh(self.config, self.mesh, run),
            out_shardings=row_shardings(self.mesh, Rollout),
        )

    @functools.cached_property
    def replace_rows(self) -> Callable[[Rollout, Rollout, Array], Rollout]:
        """`occ_jax.rl.batches.replace_rows`, for dynamic sampling."""
        return jax.jit(replace_rows, out_shardings=row_shardings(self.mesh, Rollout))

    @functools.cached_property
    def split(self) -> Callable[[Params, Params | None, Rollout, Array], list[Batch]]:
        """`occ_jax.rl.batches.split_rollout`: (params, reference, rollout, rewards)."""

        def run(*arguments: Any) -> list[Batch]:
            batches = split_rollout(self.model, self.config, *arguments)
            shardings = [row_shardings(self.mesh, Batch)] * len(batches)
            return jax.lax.with_sharding_constraint(batches, shardings)

        return jax.jit(on_mesh(self.mesh, run))

    @functools.cached_property
    def update(self) -> _Update:
        """One update that measures c and v², if the regime does; the state is donated."""
        return self._jit_update(measure=True)

    @functools.cached_property
    def update_between(self) -> _Update:
        """One update between two measurements (`mtp.measure_every`); the state is donated."""
        return self._jit_update(measure=False)

    @functools.cached_property
    def answer(self) -> Callable[..., tuple[Rollout, Float[Array, "B 2 K"]]]:
        """(params, questions, their validity, key, start, num_samples=n) to answers and counts.

        n, static, is the number of answers a question. The key is folded with `start`, the number
        of the first question in its set. Counts are `occ_jax.rollout.measures.agreement_counts`.
        """

        def run(
            params: Params,
            questions: Int[Array, "N P"],
            valid: Bool[Array, "N P"],
            key: Key[Array, ""],
            start: UInt32[Array, ""],
            *,
            num_samples: int,
        ) -> tuple[Rollout, Float[Array, "B 2 K"]]:
            key = jax.random.fold_in(key, start)
            sampling = self._sampling(self.config.rollout.temperature)
            rollout = sample(
                self.model, params, questions, valid, key, group_size=num_samples, **sampling
            )
            # Agreement is computed in pieces about as large as a micro-batch, for which an update
            # has memory.
            wanted = self.config.algorithm.updates_per_rollout * self.config.algorithm.micro_batches
            pieces = math.gcd(wanted, len(rollout.tokens) // self.config.mesh.row_shards)
            return rollout, agreement_counts(self.model, params, rollout, pieces)

        return jax.jit(
            on_sampling_mesh(self.config, self.mesh, run),
            static_argnames="num_samples",
            out_shardings=(row_shardings(self.mesh, Rollout), row_sharding(self.mesh)),
        )

    @functools.cached_property
    def completion_probability(self) -> Callable[..., Array]:
        """(trunk parameters, tokens, validity, response=R) to one probability a row; R is static.

        See `occ_jax.rollout.measures.completion_probability`.
        """
        return jax.jit(
            on_mesh(self.mesh, functools.partial(completion_probability, self.model)),
            static_argnames="response",
            out_shardings=row_sharding(self.mesh),
        )

    @functools.cached_property
    def complete(self) -> Callable[..., Rollout]:
        """(params, prompts, validity, key, temperature=t), t static, to one completion a prompt."""

        def run(params: Params, *arguments: Array, temperature: float) -> Rollout:
            sampling = self._sampling(temperature)
            return sample(self.model, params, *arguments, group_size=1, **sampling)

        return jax.jit(on_sampling_mesh(self.config, self.mesh, run), static_argnames="temperature")

    def trained(self) -> Iterator[tuple[str, Any]]:
        """Name and program of all that a training run compiles, but for its evaluations."""
        yield "rollout", self.sample
        yield "mini-batches", self.split
        yield "update", self.update
        if active_estimator(self.config) is not None and self.config.mtp.measure_every > 1:
            yield "update between", self.update_between

    def _sampling(self, temperature: float) -> dict[str, Any]:
        return {
            "max_new_tokens": self.config.rollout.max_new_tokens,
            "temperature": temperature,
            "eos_ids": self.end_ids,
            "pad_id": self.pad_id,
        }

    def _jit_update(self, *, measure: bool) -> _Update:
        model, config, mesh = self.model, self.config, self.mesh
        state = jax.tree.map(lambda x: x.sharding, abstract_state(model, config, mesh))
        run = functools.partial(train_step, model, config, measure=measure)
        return jax.jit(
            on_mesh(mesh, run),
            in_shardings=(state, row_shardings(mesh, Batch)),
            out_shardings=(state, replicated(mesh)),
            donate_argnums=0,
        )
