"""Loads and saves Hugging Face checkpoints: config.json, published tensor names, safetensors."""

from occ_jax.models.huggingface.families import read_config as read_config
from occ_jax.models.huggingface.load import load_pretrained as load_pretrained
from occ_jax.models.huggingface.save import save_pretrained as save_pretrained
