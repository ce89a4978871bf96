"""What a step must not cost: transfers nobody asked for, compilations, waiting, a second state."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import occ_jax.training.experience
from occ_jax.config import MeshConfig
from occ_jax.files import read_rows
from occ_jax.parallel.sharding import make_mesh, row_sharding
from occ_jax.programs import make_programs
from occ_jax.progress import Progress
from occ_jax.rl.train_step import abstract_state, place_state
from occ_jax.training.checkpoint import Checkpoints
from occ_jax.training.loop import Run, train
from occ_jax.types import Batch, map_rows
from tests.tiny import tiny_config, verifier_saying

pytestmark = pytest.mark.usefixtures("quick_compilation")


def every_kind_of_step(directory, **run):
    """Steps with and without measurement, evaluation and checkpoint, of one rollout and of two."""
    config = tiny_config(directory, **{"steps": 7, "evaluate_every": 3, **run})
    return dataclasses.replace(
        config,
        rollout=dataclasses.replace(config.rollout, dynamic_sampling=True),
        mtp=dataclasses.replace(config.mtp, measure_every=2),
        algorithm=dataclasses.replace(config.algorithm, kl_coefficient=0.01),
    )


@pytest.fixture
def half_is_dropped(monkeypatch):
    """A verifier that calls some groups right throughout, more in every second rollout."""
    turns = itertools.count()

    def scores(completions):
        found = 0.0 * completions[:, :, 0]
        found[next(turns) % 2 :: 2, 0] = 1.0
        return found

    judge = verifier_saying(scores)
    monkeypatch.setattr(occ_jax.training.experience, "judge_completions", judge)


def test_nothing_compiles_after_the_first_step_of_each_kind(tmp_path, monkeypatch, half_is_dropped):
    compiled = []

    def listen(event, _seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(about.get("fun_name", "?"))

    save, at = Checkpoints.save, {}

    def watched_save(self, step, *arguments):
        save(self, step, *arguments)
        at[step] = len(compiled)

    monkeypatch.setattr(Checkpoints, "save", watched_save)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(every_kind_of_step(tmp_path), Progress(quiet=True))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    # By the save of step 2 there were both kinds of update, a second rollout and an evaluation.
    assert sorted(at) == [2, 4, 6, 7] and at[2] > 3
    assert compiled[at[2] :] == []
    rows_written = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert {row["train/num_gen_batches"] for row in rows_written[1:]} == {2.0}


def test_a_transfer_that_nobody_asked_for_is_an_error(tmp_path, monkeypatch):
    update = Run.update

    def careless(run, state, batches, step):
        if step == 2:
            jnp.sin(np.ones(3, np.float32))
        return update(run, state, batches, step)

    monkeypatch.setattr(Run, "update", careless)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(tiny_config(tmp_path, steps=2), Progress(quiet=True))


def test_metrics_are_fetched_while_the_next_rollout_is_under_way(tmp_path, monkeypatch):
    events = []
    for name, step_of in (
        ("collect", lambda run, state, step: step),
        ("update", lambda run, state, batches, step: step),
        ("finish", lambda run, pending, ended, skipped: pending.row["step"]),
    ):
        original = getattr(Run, name)

        def watched(*arguments, name=name, step_of=step_of, original=original):
            events.append(f"{name} {step_of(*arguments)}")
            return original(*arguments)

        monkeypatch.setattr(Run, name, watched)
    train(
        tiny_config(tmp_path, steps=3, evaluate_every=3, checkpoint_every=3), Progress(quiet=True)
    )
    assert events == [
        *("collect 1", "update 1"),
        *("collect 2", "finish 1", "update 2"),
        *("collect 3", "finish 2", "update 3", "finish 3"),  # the last has nothing to wait for
    ]


@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(data=2, fsdp=2)])
@pytest.mark.parametrize("measure", [True, False])
def test_the_state_is_updated_in_place(tmp_path, mesh_config, measure):
    config = dataclasses.replace(tiny_config(tmp_path), mesh=mesh_config)
    mtp = dataclasses.replace(config.mtp, estimator="exact")
    config = dataclasses.replace(config, mtp=mtp)
    mesh = make_mesh(config.mesh)
    programs = make_programs(config, mesh, (1,), 0)
    model, step = programs.model, programs.update if measure else programs.update_between
    shape, columns = (8, 4), 8
    batch = Batch(
        tokens=np.full((8, columns), 3, np.int32),
        valid=np.ones((8, columns), bool),
        response_mask=np.ones(shape, bool),
        old_log_probs=np.full(shape, -2.0, np.float32),
        old_auxiliary_log_probs=np.full((1, *shape), -2.0, np.float32),
        reference_log_probs=None,
        weights=None,
        advantages=np.linspace(-1, 1, 8, dtype=np.float32),
    )
    batch = map_rows(lambda x, axis: jax.device_put(x, row_sharding(mesh, axis)), batch)
    like = abstract_state(model, config, mesh)
    compiled = step.lower(like, batch).compile()

    def size(leaf):
        return np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=int) * leaf.dtype.itemsize

    key = jax.eval_shape(jax.random.key_data, like.key)
    held = sum(size(leaf) for leaf in jax.tree.leaves(like._replace(key=None))) + key.size * 4
    assert compiled.memory_analysis().alias_size_in_bytes == held
    shardings = jax.tree.map(lambda x: x.sharding, like.params)
    params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
    state = place_state(config, params, 0, mesh)
    after, _ = step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, batch)))
