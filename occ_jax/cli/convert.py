"""Conversion between a Hugging Face directory and an orbax checkpoint, MTP modules included."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax

from occ_jax.config import DType, MeshConfig, ModelConfig, model_from_dict
from occ_jax.errors import UserError
from occ_jax.models import Model, load_pretrained, read_config, save_pretrained
from occ_jax.models.huggingface.load import check_config
from occ_jax.models.huggingface.save import StoredDType, new_directory
from occ_jax.models.huggingface.tensors import is_pretrained, read_json
from occ_jax.models.model import num_parameters
from occ_jax.parallel.sharding import abstract, make_mesh
from occ_jax.training.checkpoint import find_checkpoint, restore_params, save_params
from occ_jax.training.run_directory import RunDirectory

MODEL = "model.json"  # beside converted parameters: what they are of


def convert(
    source: Path, target: Path, *, dtype: StoredDType = "source", layout: Path | None = None
) -> str:
    """Converts a Hugging Face directory to an orbax checkpoint, or a checkpoint to one.

    Args:
        source: a Hugging Face directory, a run directory or one of its checkpoints, or what this
            function made of a Hugging Face directory.
        target: a new directory: an orbax checkpoint, or a Hugging Face directory laid out as the
            one the model came from.
        dtype: of the parameters; "source" for the types of the published tensors, which in an
            orbax checkpoint is float32, wide enough for all of them.
        layout: the Hugging Face directory the model came from, where it is no longer at the path
            it was read from.

    Returns:
        One line about what was done.

    Raises:
        UserError: `source` is none of these or damaged, `target` exists, the model came from no
            Hugging Face directory, or `layout` is of another model.
    """
    if is_pretrained(source):
        if layout is not None:
            raise UserError(f"--layout is {layout}; {source} has a layout of its own")
        return _to_orbax(source, target, "bfloat16" if dtype == "bfloat16" else "float32")
    checkpoint = find_checkpoint(source)
    config = _model_of(checkpoint)
    if not config.checkpoint:
        raise UserError(
            f"{checkpoint} was trained from random parameters; only what came from a Hugging Face "
            "directory has names and a layout to be written in"
        )
    if layout is not None:
        config = check_config(layout, config)
    model, mesh = Model(config), make_mesh(MeshConfig())
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = restore_params(checkpoint, abstract(mesh, shapes))
    saved = save_pretrained(model, params, target, dtype=dtype)
    return f"{target}: {saved.tensors:,} tensors, {saved.size:,} bytes, as in {config.checkpoint}"


def _to_orbax(source: Path, target: Path, param_dtype: DType) -> str:
    config = read_config(source.absolute(), ModelConfig(param_dtype=param_dtype))
    _, params = load_pretrained(source, config=config)
    with new_directory(target) as directory:
        save_params(directory, params, {MODEL: dataclasses.asdict(config)})
    modules = f"{config.num_mtp_modules} MTP modules"
    return f"{target}: {num_parameters(params):,} parameters in {param_dtype}, {modules}"


def _model_of(checkpoint: Path) -> ModelConfig:
    """The model of a run's checkpoint, or of converted parameters."""
    if (checkpoint / MODEL).is_file():
        return model_from_dict(read_json(checkpoint / MODEL))
    run = RunDirectory.containing(checkpoint)
    if run is not None and run.config_file.is_file():
        return run.config().model
    raise UserError(f"{checkpoint} has no {MODEL} and belongs to no run with a config")
