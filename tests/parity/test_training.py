"""A published checkpoint trained by the command line, handed back, and read by transformers."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from occ_jax.cli.arguments import main
from occ_jax.models import load_pretrained
from tests.parity import reference

GOLDEN = Path(__file__).parent.parent / "golden"
REGIMES = {
    "detach": ("--mtp.regime", "detach"),
    "ce": ("--mtp.regime", "ce"),
    "policy": ("--mtp.regime", "policy"),
    "log_prob": ("--mtp.estimator", "log_prob"),
    "exact": ("--mtp.estimator", "exact"),
    "cross_batch": ("--mtp.estimator", "cross_batch", "--algorithm.micro-batches", "2"),
}
ONE_STEP = (
    *("--task.digits", "1", "--warm-start.steps", "0", "--run.steps", "1"),
    *("--rollout.num-prompts", "4", "--rollout.group-size", "2", "--rollout.max-new-tokens", "4"),
    *("--algorithm.updates-per-rollout", "2", "--run.evaluation-prompts", "2"),
    # A random policy earns nothing; the entropy bonus gives the trunk a gradient all the same.
    *("--algorithm.entropy-coefficient", "0.1", "--optimizer.learning-rate", "0.01"),
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("family", ["glm_air", "mimo"])
def test_a_step_of_training_is_in_the_saved_directory(family, regime, tmp_path):
    source, run, saved = GOLDEN / family, tmp_path / "run", tmp_path / "saved"
    config = str(Path(__file__).parents[2] / "configs" / "addition.py")
    arguments = ("--model.checkpoint", str(source), "--run.directory", str(run))
    assert main(["train", config, *arguments, *ONE_STEP, *REGIMES[regime]]) == 0
    assert main(["convert", str(run), str(saved)]) == 0

    before, after = reference.read_tensors(source), reference.read_tensors(saved)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert (tensor.dtype, tensor.shape) == (before[name].dtype, before[name].shape)
    moved = {name for name, tensor in after.items() if not tensor.equal(before[name])}
    prefix = "model.mtp_layers.0." if family == "mimo" else "model.layers.2."
    modules = {name for name in after if name.startswith(prefix)}
    assert any(name.startswith("model.layers.0.") for name in moved)
    # Experts that no token was sent to stay; the projections of the block do not.
    for part in ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "input_layernorm.weight"):
        assert prefix + part in moved & modules
    for copy, original in (
        ("shared_head.head.weight", "lm_head.weight"),
        ("embed_tokens.weight", "model.embed_tokens.weight"),
    ):
        if prefix + copy in after:
            assert after[prefix + copy].equal(after[original])
            assert original in moved

    tokens = np.random.default_rng(0).integers(0, 57, (2, 7)).astype(np.int32)
    lengths = np.array([7, 5])
    theirs = reference.run(reference.load(saved), tokens, lengths, depth=2)
    model, params = load_pretrained(saved)
    ours = model.apply(params, jnp.asarray(tokens), jnp.asarray(lengths), mtp_depth=2)
    for found, wanted in zip(
        (ours.logits, *ours.mtp_logits), (theirs.logits, *theirs.mtp_logits), strict=True
    ):
        real = np.arange(found.shape[1]) < (lengths - (7 - found.shape[1]))[:, None]
        error = np.abs(np.where(real[..., None], found - wanted, 0)).max()
        assert error <= 1e-4 * np.abs(wanted).max()
