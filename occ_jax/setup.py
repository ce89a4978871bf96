"""The setup of a run or an evaluation: config, devices, tokenizer and verifiers, opened once.

Everything here is fixed while a command runs. Parameters, prompts and random keys are not; they are
arguments of what works on a `Setup`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from occ_jax.config import Config
from occ_jax.data.pipeline import prompt_columns
from occ_jax.data.tasks import completion_tokens, prompt_tokens
from occ_jax.data.tokenizer import Tokenizer, model_tokenizer
from occ_jax.errors import UserError
from occ_jax.models.huggingface.load import read_layout
from occ_jax.models.model import Model
from occ_jax.parallel.exchange import check_processes
from occ_jax.parallel.sharding import make_mesh
from occ_jax.programs import Programs, make_programs
from occ_jax.rewards.judging import open_pool
from occ_jax.rewards.pool import VerifierPool


@dataclass(frozen=True)
class Setup:
    """The fixed surroundings of training and evaluation; `open_setup` makes one."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    pool: VerifierPool

    @property
    def model(self) -> Model:
        """The architecture."""
        return Model(self.config.model)

    @property
    def programs(self) -> Programs:
        """The jitted programs, shared with every setup that compiles alike."""
        return make_programs(self.config, self.mesh, self.tokenizer.eos_ids, self.tokenizer.pad_id)


@contextmanager
def open_setup(config: Config, **options: Any) -> Generator[Setup]:
    """Checks a config against tokenizer, checkpoint and devices, and starts the verifiers.

    Args:
        config: the experiment.
        options: further settings, JSON values, that all processes must have been given alike.

    Raises:
        UserError: config, task, checkpoint or devices do not fit together, a verifier cannot be
            had, or the processes differ.
    """
    tokenizer = fitting_tokenizer(config)
    if config.model.checkpoint:
        read_layout(config.model)  # a fault of its files is reported before anything is written
    with open_pool(config) as pool:
        mesh = make_mesh(config.mesh)
        check_processes(config, mesh, **options)
        yield Setup(config, mesh, tokenizer, pool)


def fitting_tokenizer(config: Config) -> Tokenizer:
    """Returns the tokenizer of a config whose model and rollout are large enough for its prompts.

    A config may be planned with although no run can start from it; this refuses it.

    Raises:
        UserError: a field, with its value and what it must be.
    """
    tokenizer = model_tokenizer(config.model)
    task, rollout, model = config.task, config.rollout, config.model
    if config.dataset.name and not model.checkpoint:
        raise UserError(
            f"model.checkpoint is ''; it must be a Hugging Face checkpoint's directory with "
            f"dataset.name {config.dataset.name}, whose text the digit alphabet cannot spell"
        )
    minimums = [("model.vocab_size", model.vocab_size, tokenizer.vocab_size, "the tokenizer")]
    columns = prompt_columns(config)
    if not config.dataset.name:
        owner = f"task {task.name}"
        minimums += [
            ("rollout.max_prompt_tokens", columns, prompt_tokens(task), owner),
            ("rollout.max_new_tokens", rollout.max_new_tokens, completion_tokens(task), owner),
        ]
    for name, value, minimum, owner in minimums:
        if value < minimum:
            raise UserError(f"{name} is {value}; {owner} needs at least {minimum}")
    depth = model.num_mtp_modules
    if depth >= columns:
        raise UserError(
            f"model.num_mtp_modules is {depth}; prompts have {columns} tokens, enough for "
            f"{columns - 1}"
        )
    return tokenizer
