"""Every case of every family against transformers, live: loaded, saved, changed and saved again."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ_jax.config import ModelConfig
from occ_jax.models import Model, load_pretrained, read_config, save_pretrained
from tests.parity import reference
from tests.parity.checkpoints import write_checkpoint
from tests.parity.families import CASES, Case
from tests.parity.make_golden import example_batch

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
apply = jit(Model.apply, static_argnums=0, static_argnames="mtp_depth")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def compare(model, params, directory: Path, seed: int):
    """Main and MTP logits at depths 1 and 2 of right-padded rows, to 1e-4 of the largest."""
    tokens, lengths = example_batch(seed)
    theirs = reference.run(
        reference.load(directory), tokens, lengths, trunk_hidden=model.config.mtp_trunk_hidden
    )
    depth = len(theirs.mtp_logits)
    ours = apply(model, params, jnp.asarray(tokens), jnp.asarray(lengths), mtp_depth=depth)
    pairs = [(ours.logits, theirs.logits), *zip(ours.mtp_logits, theirs.mtp_logits, strict=True)]
    for ahead, (found, wanted) in enumerate(pairs):
        real = np.arange(wanted.shape[1]) < (lengths - ahead)[:, None]
        error = np.abs(np.where(real[..., None], np.asarray(found) - wanted, 0)).max()
        assert error <= 1e-4 * np.abs(wanted).max()
    return depth


@each_case
@pytest.mark.parametrize("seed", [0, 1])
def test_the_numbers_of_transformers(case: Case, seed: int, tmp_path: Path):
    case = dataclasses.replace(case, seed=case.seed + 100 * seed)
    write_checkpoint(case, tmp_path / "source")
    config = read_config(tmp_path / "source", ModelConfig(scan_layers=seed == 1))
    model, params = load_pretrained(tmp_path / "source", config=config)
    depth = compare(model, params, tmp_path / "source", seed)
    assert depth == (2 if config.num_mtp_modules else 0)


@each_case
def test_what_was_trained_is_what_transformers_reads(case: Case, tmp_path: Path):
    write_checkpoint(case, tmp_path / "source")
    model, params = load_pretrained(tmp_path / "source")
    rng = np.random.default_rng(case.seed)
    moved = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(x.dtype), params)
    save_pretrained(model, moved, tmp_path / "saved", dtype="float32")
    assert compare(model, moved, tmp_path / "saved", 3) == (2 if params["mtp"] else 0)
