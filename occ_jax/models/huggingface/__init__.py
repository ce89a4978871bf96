"""Loads and saves Hugging Face checkpoints: config.json, published tensor names, safetensors."""

from occ_jax.models.huggingface.families import read_config
from occ_jax.models.huggingface.load import load_pretrained
from occ_jax.models.huggingface.save import save_pretrained

__all__ = ["load_pretrained", "read_config", "save_pretrained"]
