"""The model (trunk, MTP modules, caches) as pure functions of a parameter tree."""

from occ_jax.models.attention import KVCache
from occ_jax.models.huggingface import load_pretrained, read_config, save_pretrained
from occ_jax.models.model import Model, ModelOutput, num_parameters

__all__ = [
    "KVCache",
    "Model",
    "ModelOutput",
    "load_pretrained",
    "num_parameters",
    "read_config",
    "save_pretrained",
]
