"""The model (trunk, MTP modules, caches) as pure functions of a parameter tree."""

from occ_jax.models.attention import KVCache as KVCache
from occ_jax.models.huggingface import (
    load_pretrained as load_pretrained,
    read_config as read_config,
    save_pretrained as save_pretrained,
)
from occ_jax.models.model import (
    Model as Model,
    ModelOutput as ModelOutput,
    num_parameters as num_parameters,
)
