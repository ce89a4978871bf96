"""Parameters of a policy: of a run, of one of its checkpoints or of a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import jax
from jax.sharding import Mesh

from occ_jax.config import Config, Fact, differences, fields_with
from occ_jax.errors import UserError
from occ_jax.models.huggingface import load_pretrained
from occ_jax.models.huggingface.tensors import is_pretrained
from occ_jax.models.model import Model
from occ_jax.parallel.exchange import on_first_process
from occ_jax.parallel.sharding import abstract
from occ_jax.training.checkpoint import find_checkpoint, restore_params
from occ_jax.training.run_directory import RunDirectory, is_same_directory
from occ_jax.types import Params


def newest_checkpoint(path: Path) -> Path:
    """Returns the checkpoint that a path names, the same one on all processes.

    Raises:
        UserError: there is none.
    """
    if is_pretrained(path):
        return path
    # A run that still trains may have another one by the time the next process looks.
    return Path(on_first_process(lambda: str(find_checkpoint(path))))


def load_policy(config: Config, mesh: Mesh, checkpoint: Path) -> Params:
    """Loads the parameters of a checkpoint, after checking that they are of the configured model.

    Args:
        config: its model is the checkpoint's.
        mesh: the devices that the parameters go to.
        checkpoint: from `newest_checkpoint`.

    Raises:
        UserError: the files are damaged or of another model.
    """
    if is_pretrained(checkpoint):
        return load_pretrained(checkpoint, config=config.model, mesh=mesh)[1]
    run = RunDirectory.containing(checkpoint)
    if run is not None and run.config_file.exists():
        changed = [
            f"{name} is {trained!r} in its run and {configured!r} in the config"
            for name, (trained, configured) in differences(run.config(), config).items()
            if name not in fields_with(Fact.SAME_MODEL, Config)
            and not (name == "model.checkpoint" and is_same_directory(trained, configured))
        ]
        if changed:
            raise UserError(f"{checkpoint} is of another model: {', '.join(changed)}")
    shapes = jax.eval_shape(Model(config.model).init, jax.random.key(0))
    return restore_params(checkpoint, abstract(mesh, shapes))
