"""Names of policies and verifiers in the headers of evaluation records.

A name changes if and only if the parameters, or the verifier's code, change. Leaves comparing names
to `occ_jax.evaluation.records`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from occ_jax.parallel.exchange import get_all_rows
from occ_jax.types import Params

_DIGEST_DIGITS = 16  # hexadecimal
# Knuth's multiplicative hash: a prime near 2^32 / golden ratio spreads bits over the whole word.
_HASH_MULTIPLIER = 0x9E3779B1


def fingerprint(params: Params) -> str:
    """A digest of parameters in 16 hexadecimal digits, by names, shapes and values alone.

    Values enter as two sums of the elements' bits, weighted by position, modulo 2^32. Such sums are
    exact, so they do not depend on the sharding. The digest guards against mistakes, not attacks.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = get_all_rows(_weighted_bits([leaf for _, leaf in leaves]))
    digest = hashlib.sha256()
    for (path, leaf), pair in zip(leaves, sums.tolist(), strict=True):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {pair}\n".encode())
    return digest.hexdigest()[:_DIGEST_DIGITS]


@jax.jit
def _weighted_bits(leaves: Sequence[Array]) -> UInt32[Array, "L 2"]:
    """Two uint32 sums of every leaf."""

    def sums(leaf: Array) -> Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        position = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(
                jnp.uint32, leaf.shape, axis
            )
        odd = 2 * position + 1
        mixed = (bits ^ (bits >> 15)) * jnp.uint32(_HASH_MULTIPLIER)
        return jnp.stack([jnp.sum(bits * odd), jnp.sum(mixed * (odd ^ (odd << 13)))])

    return jnp.stack([sums(leaf) for leaf in leaves])


def verifier_identity(name: str) -> str:
    """A verifier's name; for a user's function, with a digest of the file that defines it.

    The digest does not cover modules that the file imports, and a module without a file, such as
    one inside an archive, has none. Nothing is imported: users' code runs only in the verifier
    processes.
    """
    module, separator, _ = name.rpartition(":")
    if not separator:
        return name
    path = Path(module) if module.endswith(".py") else _module_file(module)
    if path is None:
        return name
    return f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()[:_DIGEST_DIGITS]}"


def _module_file(module: str) -> Path | None:
    """The file that `import` would load a module from, or None if there is no such file."""
    name, directories = "", None
    for part in module.split("."):
        if name and directories is None:
            return None
        name = f"{name}.{part}" if name else part
        spec = PathFinder.find_spec(name, directories)
        if spec is None:
            return None
        origin, directories = spec.origin, spec.submodule_search_locations
    return Path(origin) if origin is not None and Path(origin).is_file() else None
