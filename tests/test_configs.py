"""The configs that ship: each loads, and the paper's recipes carry the paper's numbers."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from occ_jax.cli.arguments import main
from occ_jax.cli.config_file import load_config
from occ_jax.data.published import PUBLISHED
from occ_jax.errors import UserError
from occ_jax.models import Model
from occ_jax.parallel.sharding import AXES, state_shardings
from tests.checkpoint_files import GOLDEN

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = ("mimo_7b_dapo", "mimo_7b_gspo", "glm45_air_dapo")

# arXiv 2605.28184, the experiment; dual clip and dynamic sampling are DAPO's.
EXPERIMENT = {
    "dataset.name": "dapo_math_17k",
    "dataset.evaluation": ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench"),
    "dataset.overlong": "drop",
    "model.checkpoint": "",
    "model.param_dtype": "float32",
    "model.dtype": "bfloat16",
    "model.scan_layers": True,
    "model.remat": "full",
    "model.num_mtp_modules": 1,
    "rollout.num_prompts": 128,
    "rollout.group_size": 16,
    "rollout.max_prompt_tokens": 2048,
    "rollout.max_new_tokens": 8192,
    "rollout.temperature": 1.0,
    "rollout.old_log_probs": "trainer",
    "reward.wrong": -1.0,
    "reward.verifier": None,
    "reward.per_source": (("dapo_math_17k", "math_dapo"),),
    "reward.truncated": "judged",
    "algorithm.advantage": "group",
    "algorithm.kl_coefficient": 0.0,
    "algorithm.entropy_coefficient": 0.0,
    "algorithm.overlong_buffer_tokens": 4096,
    "algorithm.overlong_penalty": 1.0,
    "algorithm.updates_per_rollout": 4,
    "mtp.regime": "occ",
    "mtp.estimator": "log_prob",
    "mtp.decay": 0.9,  # ours
    "mtp.head_loss": "ce",  # ours
    "mtp.scale": 1.0,
    "mtp.eps": 1e-8,
    "optimizer.learning_rate": 1e-6,
    "optimizer.warmup_steps": 40,  # updates: 10 rollouts of 4
    "optimizer.weight_decay": 0.1,
    "optimizer.clip_norm": 1.0,
    "run.steps": 200,
    "run.evaluation_samples": 32,
}
DAPO = {
    "rollout.dynamic_sampling": True,
    "algorithm.policy_loss": "clipped",
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.28,
    "algorithm.dual_clip": 10.0,
    "algorithm.aggregation": "token-mean",
}
GSPO = {
    "rollout.dynamic_sampling": False,
    "algorithm.policy_loss": "gspo",
    "algorithm.clip_low": 3e-4,
    "algorithm.clip_high": 4e-4,
    "algorithm.dual_clip": None,
    "algorithm.aggregation": "seq-mean-token-mean",
}
# The published config.json files.
MIMO = {
    "model.rope_theta": 640_000.0,
    "model.rope_fraction": 1.0,
    "model.rms_norm_eps": 1e-5,
    "model.qk_norm": False,
    "model.tie_embeddings": False,
    "model.mtp_concat": "hidden_embed",
    "model.mtp_trunk_hidden": "pre_norm",
    "model.moe": None,
}
GLM = {
    "model.rope_theta": 1e6,
    "model.rope_fraction": 0.5,
    "model.rms_norm_eps": 1e-5,
    "model.qk_norm": False,
    "model.tie_embeddings": False,
    "model.mtp_concat": "embed_hidden",
    "model.mtp_trunk_hidden": "post_norm",
    "model.moe.experts_per_token": 8,
    "model.moe.router": "sigmoid",
    "model.moe.normalize_weights": True,
    "model.moe.weight_scale": 1.0,
    "model.moe.first_dense_layers": 1,
}
TABLES = {
    "mimo_7b_dapo": EXPERIMENT | DAPO | MIMO,
    "mimo_7b_gspo": EXPERIMENT | GSPO | MIMO,
    "glm45_air_dapo": EXPERIMENT | DAPO | GLM,
}

# Tensor by tensor, as the published checkpoints hold them.
H = 4096
KEY_VALUE = 2 * (1024 * H + 1024)
MIMO_LAYER = H * H + H + KEY_VALUE + H * H + 3 * 11008 * H + 2 * H
MIMO_MTP = MIMO_LAYER + H * 2 * H + 3 * H
MIMO_TRUNK = 2 * 151_680 * H + 36 * MIMO_LAYER + H
GLM_ATTENTION = 12288 * H + 12288 + KEY_VALUE + H * 12288 + 2 * H
GLM_EXPERTS = 128 * H + 128 + (128 + 1) * 3 * 1408 * H
GLM_MTP = GLM_ATTENTION + GLM_EXPERTS + H * 2 * H + 3 * H
GLM_TRUNK = 2 * 151_552 * H + 46 * GLM_ATTENTION + 3 * 10944 * H + 45 * GLM_EXPERTS + H
PARAMETERS = {  # (trunk, module), and what the names of the models promise, in 10^9
    "mimo_7b_dapo": (MIMO_TRUNK, MIMO_MTP, 7.83),
    "mimo_7b_gspo": (MIMO_TRUNK, MIMO_MTP, 7.83),
    "glm45_air_dapo": (GLM_TRUNK, GLM_MTP, 109.23),
}

# What the published config.json files say where the tiny ones in tests/golden say something else.
PUBLISHED_SIZES = {
    "mimo": {
        "hidden_size": H,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_680,
    },
    "glm_air": {
        "hidden_size": H,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_attention_heads": 96,
        "num_hidden_layers": 46,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151_552,
    },
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_config_loads_and_names_its_command(path):
    config = load_config(str(path))
    assert f"configs/{path.name}" in path.read_text()
    assert config.run.directory == f"runs/{path.stem}"
    assert all(name in PUBLISHED for name in config.dataset.evaluation)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_carry_the_papers_numbers(name):
    config = load_config(str(CONFIGS / f"{name}.py"))

    def value(path):
        found = config
        for part in path.split("."):
            found = getattr(found, part)
        return found

    assert {path: value(path) for path in TABLES[name]} == TABLES[name]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_published_parameters(name):
    config = load_config(str(CONFIGS / f"{name}.py"))
    shapes = jax.eval_shape(Model(config.model).init, jax.random.key(0))
    trunk, module, billions = PARAMETERS[name]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["trunk"])) == trunk
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["mtp"])) == module
    assert round((trunk + module) / 1e9, 2) == billions


@pytest.mark.parametrize(
    ("name", "family"), list(zip(RECIPES, ("mimo", "mimo", "glm_air"), strict=True))
)
def test_the_model_written_out_is_the_checkpoints(name, family, tmp_path):
    """Planning without the weights plans the run with them."""
    tiny = json.loads((GOLDEN / family / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tiny | PUBLISHED_SIZES[family]))
    recipe = str(CONFIGS / f"{name}.py")
    found = load_config(recipe, ["--model.checkpoint", str(tmp_path)]).model
    assert dataclasses.replace(found, checkpoint="") == load_config(recipe).model


def test_a_smaller_checkpoint_takes_a_smaller_mesh():
    """The recipe's own mesh has more places than the model has heads."""
    recipe = str(CONFIGS / "mimo_7b_dapo.py")
    smaller = ["--model.checkpoint", str(GOLDEN / "mimo")]
    config = load_config(recipe, [*smaller, "--mesh.tensor", "2"])
    assert (config.mesh.tensor, config.mesh.fsdp, config.model.num_heads) == (2, 8, 4)
    with pytest.raises(UserError, match=r"^mesh\.tensor is 8; it must be one of 1, 2,"):
        load_config(recipe, smaller)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_mesh_divides_the_model(recipe):
    """Nothing but routers, norms and biases is held in more than one copy."""
    config = load_config(str(CONFIGS / f"{recipe}.py"))
    shape = tuple(getattr(config.mesh, axis) for axis in AXES)
    # Only the shape of the mesh matters here; one device can stand for all.
    mesh = Mesh(np.full(shape, jax.devices()[0]), AXES)
    shapes = jax.eval_shape(Model(config.model).init, jax.random.key(0))
    held = whole = 0
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    placed = jax.tree.leaves(state_shardings(mesh, shapes))
    for (path, leaf), sharding in zip(leaves, placed, strict=True):
        name = jax.tree_util.keystr(path)
        if not any(small in name for small in ("router", "norm", "bias")):
            held += math.prod(sharding.shard_shape(leaf.shape))
            whole += leaf.size
    assert whole > 0.999 * sum(PARAMETERS[recipe][:2])
    assert held == whole / math.prod(shape)


@pytest.mark.parametrize("regime", ["detach", "ce", "policy", "occ"])
def test_the_regime_is_one_field(regime):
    for name in RECIPES:
        config = load_config(str(CONFIGS / f"{name}.py"), ["--mtp.regime", regime])
        assert config.mtp.regime == regime


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_start_with_a_checkpoint_only(name, capsys, tmp_path):
    arguments = ["train", str(CONFIGS / f"{name}.py"), "--run.directory", str(tmp_path / "run")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.checkpoint is ''; it must be")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
