"""Names by which records know whose answers they hold and who judged them."""

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


def fingerprint(params: Params) -> str:
    """16 hexadecimal digits that tell parameters apart, by their values alone.

    Two sums of the elements' bits, weighted by position, modulo 2^32: exact, so the same however
    the parameters are sharded. It guards against mistakes, not against malice.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sums = get_all_rows(_weighted_bits([leaf for _, leaf in leaves]))
    digest = hashlib.sha256()
    for (path, leaf), pair in zip(leaves, sums.tolist(), strict=True):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {pair}\n".encode())
    return digest.hexdigest()[:16]


@jax.jit
def _weighted_bits(leaves: Sequence[Array]) -> UInt32[Array, "L 2"]:
    """uint32 sums of every leaf."""

    def sums(leaf: Array) -> Array:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(
                jnp.uint32, leaf.shape, axis
            )
        odd = 2 * place + 1
        mixed = (bits ^ (bits >> 15)) * jnp.uint32(0x9E3779B1)
        return jnp.stack([jnp.sum(bits * odd), jnp.sum(mixed * (odd ^ (odd << 13)))])

    return jnp.stack([sums(leaf) for leaf in leaves])


def verifier_identity(name: str) -> str:
    """A verifier's name; with a digest of the file that holds it where it is a function of yours.

    What that file imports is not in it, nor is a module without a file, such as a compiled one
    inside an archive. Nothing is imported: code of yours runs in the verifiers' processes alone.
    """
    where, separator, _ = name.rpartition(":")
    if not separator:
        return name
    path = Path(where) if where.endswith(".py") else _file_of(where)
    if path is None:
        return name
    return f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _file_of(module: str) -> Path | None:
    """Where `import` would find a module by the path; None where it is in no file there."""
    name, places = "", None
    for part in module.split("."):
        if name and places is None:
            return None
        name = f"{name}.{part}" if name else part
        found = PathFinder.find_spec(name, places)
        if found is None:
            return None
        origin, places = found.origin, found.submodule_search_locations
    return Path(origin) if origin is not None and Path(origin).is_file() else None
