"""Parameters back into the Hugging Face directory they came from, trained.

The source directory is the pattern: every file gets the source's header and every tensor its place
there, so names, shapes, types, shards and order are the source's by construction, and a model that
was not trained is written bit for bit as it was read. Tensors are written one at a time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from occ_jax.errors import UserError
from occ_jax.models.huggingface.files import (
    CONFIG,
    DTYPES,
    INDEX,
    SCALE_SUFFIX,
    Checkpoint,
    Json,
    Tensor,
    count_bytes,
)
from occ_jax.models.huggingface.load import Layout, read_layout
from occ_jax.models.huggingface.names import EVERY, Piece, Stored, leaf_at
from occ_jax.models.model import Model
from occ_jax.types import Params

StoredDType = Literal["source", "bfloat16", "float32"]
_FORMAT = {"bfloat16": "BF16", "float32": "F32"}
_LARGEST_E4M3 = 448.0
_ROUNDS_TO_LARGEST = 464.0  # halfway to the next that the type would have
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_COPIED_BYTES = 1 << 24  # at once, of tensors that are carried over


class Saved(NamedTuple):
    """What was written."""

    tensors: int
    size: int  # bytes of tensors


def save_pretrained(
    model: Model,
    params: Params,
    directory: str | Path,
    *,
    dtype: StoredDType = "source",
) -> Saved:
    """Writes a model the way the Hugging Face directory it came from is written.

    Names, shapes, types and shards are those of `model.config.checkpoint`; its other files are
    carried over byte for byte, as are tensors that the model does not hold (a vision tower, modules
    left out). Copies of embedding and head are written from the trained ones. FP8 tensors keep the
    source's scales except in blocks that have outgrown them.

    Args:
        model: its config names the source directory, which must still be there.
        params: trunk and modules, sharded or not.
        directory: new, or empty. It appears when it is complete.
        dtype: source, or one type for all tensors, without FP8; those that the source keeps in a
            wider type than its embedding (router biases) stay in that. config.json is adapted.

    Returns:
        How much was written.

    Raises:
        UserError: no source, a directory that is not empty or cannot be written.
    """
    source, target = model.config.checkpoint, Path(directory)
    if not source:
        raise UserError(
            "the model did not come from a Hugging Face directory (model.checkpoint is empty), so "
            f"there is no layout to write {target} in"
        )
    layout = read_layout(model.config)
    with new_directory(target) as temporary:
        _copy_files(layout.checkpoint, temporary)
        if dtype == "source":
            places, headers = layout.checkpoint.tensors, layout.checkpoint.headers
        else:
            places, headers = _unquantised(layout, _FORMAT[dtype])
            _adapt_config(layout.checkpoint, temporary, dtype)
            _write_index(layout.checkpoint, temporary, places)
        for file, header in headers.items():
            ends = (place.start + place.size for place in places.values() if place.file == file)
            with (temporary / file).open("wb") as stream:
                stream.write(header)
                stream.truncate(max(ends, default=len(header)))
        for name, values in _trained(layout, params, places):
            _write(temporary, places[name], values)
        for name in layout.carried:
            if name in places:
                _carry(layout.checkpoint, name, temporary, places[name])
    return Saved(len(places), sum(place.size for place in places.values()))


@contextmanager
def new_directory(target: Path) -> Generator[Path]:
    """A directory to write in that becomes `target` at the end; nothing is left after an error.

    Raises:
        UserError: `target` is there and not empty, or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already and not empty; nothing was written")
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    # Left by a process of the same number that was killed.
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_files(checkpoint: Checkpoint, target: Path) -> None:
    """Tokenizer, configs, remote code: all files of the source that hold no weights."""
    for path in checkpoint.directory.iterdir():
        name = path.name
        other_index = name.endswith(".index.json") and name != INDEX
        if path.is_file() and name[0] != "." and not name.endswith(_WEIGHTS) and not other_index:
            shutil.copyfile(path, target / name)


def _unquantised(layout: Layout, dtype: str) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """Places and headers with every tensor in `dtype`, or wider where the source's is special."""
    checkpoint = layout.checkpoint
    usual = DTYPES[checkpoint.tensors[layout.stored[0].name].dtype].itemsize
    places: dict[str, Tensor] = {}
    headers: dict[str, bytes] = {}
    for file, old in checkpoint.headers.items():
        entries: Json = {"__metadata__": json.loads(old[8:]).get("__metadata__", {})}
        end = 0
        for name, tensor in checkpoint.tensors.items():
            if tensor.file != file or _is_scale(checkpoint, name):
                continue
            kept, size = tensor.dtype, tensor.size
            if kept in DTYPES:
                width = DTYPES[kept].itemsize
                kept = kept if width > max(usual, DTYPES[dtype].itemsize) else dtype
                size = count_bytes(kept, tensor.shape)
            offsets = [end, end + size]
            entries[name] = {"dtype": kept, "shape": list(tensor.shape), "data_offsets": offsets}
            places[name] = Tensor(file, kept, tensor.shape, end, size)
            end += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
    return {
        name: place._replace(start=place.start + len(headers[place.file]))
        for name, place in places.items()
    }, headers


def _is_scale(checkpoint: Checkpoint, name: str) -> bool:
    weight = checkpoint.tensors.get(name.removesuffix(SCALE_SUFFIX))
    return name.endswith(SCALE_SUFFIX) and weight is not None and weight.dtype == "F8_E4M3"


def _adapt_config(checkpoint: Checkpoint, target: Path, dtype: str) -> None:
    """config.json without quantisation and with the type of the tensors."""
    config = json.loads(json.dumps(checkpoint.config))
    config.pop("quantization_config", None)
    for part in (config, config.get("text_config", {})):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _write_index(checkpoint: Checkpoint, target: Path, places: dict[str, Tensor]) -> None:
    if not (target / INDEX).is_file():
        return
    old = json.loads((checkpoint.directory / INDEX).read_text())
    size = sum(place.size for place in places.values())
    index = {
        "metadata": old.get("metadata", {}) | {"total_size": size},
        "weight_map": {name: file for name, file in old["weight_map"].items() if name in places},
    }
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _trained(
    layout: Layout, params: Params, places: dict[str, Tensor]
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor that the model holds, as it is to be stored."""
    checkpoint = layout.checkpoint
    for entry in layout.stored:
        values = _gather(entry, params, checkpoint.tensors[entry.name].shape)
        place = places[entry.name]
        if place.dtype == "F8_E4M3":
            scales = checkpoint.scales(entry.name)
            assert scales is not None
            quantised, scales = quantise(values, scales, checkpoint.block)
            yield entry.name, quantised
            yield entry.name + SCALE_SUFFIX, scales
            continue
        source, wanted = checkpoint.tensors[entry.name].dtype, DTYPES[place.dtype]
        digits = [ml_dtypes.finfo(dtype).nmant for dtype in (wanted, values.dtype)]
        if source == place.dtype and digits[0] > digits[1]:
            # Training could not see the digits that its type lacks: what it left alone keeps them.
            before = checkpoint.read(entry.name)
            same = before.astype(values.dtype) == values
            yield entry.name, np.where(same, before, values.astype(wanted))
        else:
            yield entry.name, values.astype(wanted)


def _gather(entry: Stored, params: Params, shape: tuple[int, ...]) -> np.ndarray:
    """A published tensor's values, in the parameters' type, on the host."""
    take = _take_plain if entry.layout == "plain" else _take_transposed

    def values(piece: Piece) -> np.ndarray:
        leaf: jax.Array = leaf_at(params, piece.path)
        if not leaf.is_fully_addressable:
            raise UserError(
                f"{entry.name}: parameters are spread over several processes; save_pretrained "
                "gathers within one"
            )
        return np.asarray(take(leaf, piece.index))

    (first, *rest) = entry.pieces
    if not rest:
        return values(first).reshape(shape)
    axis = 0 if entry.layout == "plain" else len(shape) - 2
    found = values(first)
    whole = np.empty(shape, found.dtype)
    for number, piece in enumerate(entry.pieces):
        found = found if number == 0 else values(piece)
        whole[(*[EVERY] * axis, piece.rows)] = found
    return whole


@jax.jit
def _take_plain(leaf: jax.Array, index: tuple[Any, ...]) -> jax.Array:
    return _at(leaf, index)


@jax.jit
def _take_transposed(leaf: jax.Array, index: tuple[Any, ...]) -> jax.Array:
    return jnp.swapaxes(_at(leaf, index), -1, -2)


def _at(leaf: jax.Array, index: tuple[Any, ...]) -> jax.Array:
    for i in index:
        leaf = jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
    return leaf


def quantise(
    values: np.ndarray, scales: np.ndarray, block: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Rounds values / scale to float8_e4m3fn, one scale a block.

    Dequantised values over the scales they came with are within rounding of the FP8 values, so they
    become them again, bit for bit. A block that has outgrown its scale gets max |values| / 448.

    Args:
        values: [out, in].
        scales: of the source, [blocks of rows, blocks of columns].
        block: rows and columns of a block; those at the edges may be smaller.

    Returns:
        FP8 values and float32 scales.
    """
    rows, columns = block
    values, scales = values.astype(np.float32), scales.copy()
    quantised = np.empty(values.shape, ml_dtypes.float8_e4m3fn)
    for i, row in enumerate(range(0, values.shape[0], rows)):
        for j, column in enumerate(range(0, values.shape[1], columns)):
            part = values[row : row + rows, column : column + columns]
            largest = np.max(np.abs(part))
            if not largest <= _ROUNDS_TO_LARGEST * scales[i, j]:
                scales[i, j] = largest / _LARGEST_E4M3
            # A scale of 0 is of a block of zeros.
            divisor = scales[i, j] if scales[i, j] else np.float32(1.0)
            quantised[row : row + rows, column : column + columns] = part / divisor
    return quantised, scales


def _write(directory: Path, place: Tensor, values: np.ndarray) -> None:
    with (directory / place.file).open("r+b") as stream:
        stream.seek(place.start)
        stream.write(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)


def _carry(checkpoint: Checkpoint, name: str, target: Path, place: Tensor) -> None:
    """Copies a tensor the model does not hold, converted where its type differs now."""
    tensor = checkpoint.tensors[name]
    if tensor.dtype == place.dtype:
        with (checkpoint.directory / tensor.file).open("rb") as source:
            source.seek(tensor.start)
            with (target / place.file).open("r+b") as stream:
                stream.seek(place.start)
                for start in range(0, tensor.size, _COPIED_BYTES):
                    stream.write(source.read(min(_COPIED_BYTES, tensor.size - start)))
        return
    values: Any = np.array(checkpoint.read(name))
    scales = checkpoint.scales(name)
    if scales is not None:
        rows, columns = checkpoint.block
        wide = scales.repeat(rows, 0).repeat(columns, 1)[: values.shape[0], : values.shape[1]]
        values = values.astype(np.float32) * wide
    _write(target, place, values.astype(DTYPES[place.dtype]))
