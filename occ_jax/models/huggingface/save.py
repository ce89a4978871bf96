"""Saves parameters in the format of the Hugging Face directory that they were loaded from.

Every file gets the header of the source's file, and every tensor its offset there. So names,
shapes, dtypes, shards and order are those of the source, and a model that was not trained is saved
bit for bit as it was loaded. Tensors are written one at a time.
"""

from __future__ import annotations

import copy
import functools
import json
import math
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
from occ_jax.models.huggingface.load import CheckpointLayout, read_layout
from occ_jax.models.huggingface.names import EVERY, Piece, Stored, leaf_at
from occ_jax.models.huggingface.tensors import (
    CONFIG,
    DTYPES,
    INDEX,
    SCALE_SUFFIX,
    Checkpoint,
    Json,
    Tensor,
)
from occ_jax.models.model import Model
from occ_jax.types import Params

StoredDType = Literal["source", "bfloat16", "float32"]
_FORMAT = {"bfloat16": "BF16", "float32": "F32"}
_LARGEST_E4M3 = 448.0
_ROUNDS_TO_LARGEST = 464.0  # halfway to the next number if there were one
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_COPIED_BYTES = 1 << 24  # of tensors that are carried over, at once


class Saved(NamedTuple):
    """Size of what was written."""

    tensors: int
    size: int  # bytes of tensors


def save_pretrained(
    model: Model, params: Params, directory: str | Path, *, dtype: StoredDType = "source"
) -> Saved:
    """Saves a model in the format of the Hugging Face directory that it was loaded from.

    Names, shapes, dtypes and shards are those of `model.config.checkpoint`. Its other files are
    copied byte for byte, and so are tensors that the model does not hold (a vision tower, unused
    modules). Copies of embedding and head are written from the trained ones. FP8 tensors keep the
    scales of the source, except blocks whose values have become too large for them.

    Args:
        model: its config names the source directory, which must still exist.
        params: trunk and modules, sharded or not.
        directory: must be new or empty. It appears when it is complete.
        dtype: "source", or one dtype for all tensors, without FP8. Tensors whose source dtype is
            wider than that of the embedding (router biases) keep it. config.json is adapted.

    Returns:
        Number of tensors and bytes written.

    Raises:
        UserError: there is no source, or the directory is not empty or cannot be written.
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
            saved, headers = layout.checkpoint.tensors, layout.checkpoint.headers
        else:
            saved, headers = _unquantised(layout, _FORMAT[dtype])
            _adapt_config(layout.checkpoint, temporary, dtype)
            _write_index(temporary, saved)
        for file, header in headers.items():
            ends = (tensor.start + tensor.size for tensor in saved.values() if tensor.file == file)
            with (temporary / file).open("wb") as stream:
                stream.write(header)
                stream.truncate(max(ends, default=len(header)))
        for name, values in _trained(layout, params, saved):
            _write(temporary, saved[name], values)
        for name in layout.carried:
            if name in saved:
                _carry(layout.checkpoint, name, temporary, saved[name])
    return Saved(len(saved), sum(tensor.size for tensor in saved.values()))


@contextmanager
def new_directory(target: Path) -> Generator[Path]:
    """Creates a directory that is renamed to `target` at the end, and removed after an error.

    Raises:
        UserError: `target` exists and is not empty, or cannot be written.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already and not empty; nothing was written")
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    # An earlier process with the same number may have been killed here.
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
    """Copies all files of the source without weights: tokenizer, configs, remote code."""
    for path in checkpoint.directory.iterdir():
        name = path.name
        other_index = name.endswith(".index.json") and name != INDEX
        if path.is_file() and name[0] != "." and not name.endswith(_WEIGHTS) and not other_index:
            shutil.copyfile(path, target / name)


def _unquantised(
    layout: CheckpointLayout, dtype: str
) -> tuple[dict[str, Tensor], dict[str, bytes]]:
    """Tensors and headers in `dtype`; tensors of a wider dtype than usual keep theirs."""
    checkpoint = layout.checkpoint
    usual = DTYPES[checkpoint.tensors[layout.stored[0].name].dtype].itemsize
    saved: dict[str, Tensor] = {}
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
                size = math.prod(tensor.shape) * DTYPES[kept].itemsize
            offsets = [end, end + size]
            entries[name] = {"dtype": kept, "shape": list(tensor.shape), "data_offsets": offsets}
            saved[name] = Tensor(file, kept, tensor.shape, end, size)
            end += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        headers[file] = len(text).to_bytes(8, "little") + text
    return {
        name: tensor._replace(start=tensor.start + len(headers[tensor.file]))
        for name, tensor in saved.items()
    }, headers


def _is_scale(checkpoint: Checkpoint, name: str) -> bool:
    weight = checkpoint.tensors.get(name.removesuffix(SCALE_SUFFIX))
    return name.endswith(SCALE_SUFFIX) and weight is not None and weight.dtype == "F8_E4M3"


def _adapt_config(checkpoint: Checkpoint, target: Path, dtype: str) -> None:
    """Writes config.json without quantisation and with the dtype of the tensors."""
    config = copy.deepcopy(checkpoint.config)
    config.pop("quantization_config", None)
    for part in (config, config.get("text_config", {})):
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _write_index(target: Path, saved: dict[str, Tensor]) -> None:
    if not (target / INDEX).is_file():
        return
    old = json.loads((target / INDEX).read_text())
    size = {"total_size": sum(tensor.size for tensor in saved.values())}
    files = {name: file for name, file in old["weight_map"].items() if name in saved}
    index = {"metadata": old.get("metadata", {}) | size, "weight_map": files}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _trained(
    layout: CheckpointLayout, params: Params, saved: dict[str, Tensor]
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values, as they are stored, of every tensor that the model holds."""
    checkpoint = layout.checkpoint
    for entry in layout.stored:
        values = _gather(entry, params, checkpoint.tensors[entry.name].shape)
        tensor = saved[entry.name]
        if tensor.dtype == "F8_E4M3":
            scales = checkpoint.scales(entry.name)
            assert scales is not None
            quantised, scales = quantise(values, scales, checkpoint.block)
            yield entry.name, quantised
            yield entry.name + SCALE_SUFFIX, scales
            continue
        source, wanted = checkpoint.tensors[entry.name].dtype, DTYPES[tensor.dtype]
        digits = [ml_dtypes.finfo(dtype).nmant for dtype in (wanted, values.dtype)]
        if source == tensor.dtype and digits[0] > digits[1]:
            # Parameters have fewer digits than the source: values that training did not change keep
            # the digits of the source.
            original = checkpoint.read(entry.name)
            same = original.astype(values.dtype) == values
            yield entry.name, np.where(same, original, values.astype(wanted))
        else:
            yield entry.name, values.astype(wanted)


def _gather(entry: Stored, params: Params, shape: tuple[int, ...]) -> np.ndarray:
    """A published tensor's values on the host, in the dtype of the parameters."""

    def values(piece: Piece) -> np.ndarray:
        leaf: jax.Array = leaf_at(params, piece.path)
        if not leaf.is_fully_addressable:
            raise UserError(
                f"{entry.name}: parameters are spread over several processes; save_pretrained "
                "gathers within one"
            )
        return np.asarray(_take(leaf, piece.index, transposed=entry.layout.transposed))

    if len(entry.pieces) == 1:
        return values(entry.pieces[0]).reshape(shape)
    axis = entry.layout.rows_axis(len(shape))
    whole = np.empty(shape, leaf_at(params, entry.pieces[0].path).dtype)
    for piece in entry.pieces:
        whole[(*[EVERY] * axis, piece.rows)] = values(piece)
    return whole


@functools.partial(jax.jit, static_argnames="transposed")
def _take(leaf: jax.Array, index: tuple[Any, ...], *, transposed: bool) -> jax.Array:
    for i in index:
        leaf = jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
    return jnp.swapaxes(leaf, -1, -2) if transposed else leaf


def quantise(
    values: np.ndarray, scales: np.ndarray, block: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Rounds values / scale to float8_e4m3fn, with one scale per block.

    Dequantised values divided by their own scales are within rounding of the FP8 values, so they
    become the same bits again. A block with values too large for its scale gets max |values| / 448.

    Args:
        values: [out, in].
        scales: of the source, [blocks of rows, blocks of columns].
        block: rows and columns of a block; blocks at the edges may be smaller.

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
            # The scale of a block of zeros is 0.
            divisor = scales[i, j] if scales[i, j] else np.float32(1.0)
            quantised[row : row + rows, column : column + columns] = part / divisor
    return quantised, scales


def _write(directory: Path, tensor: Tensor, values: np.ndarray) -> None:
    with (directory / tensor.file).open("r+b") as stream:
        stream.seek(tensor.start)
        stream.write(np.ascontiguousarray(values).view(np.uint8).reshape(-1).data)


def _carry(checkpoint: Checkpoint, name: str, target: Path, tensor: Tensor) -> None:
    """Copies a tensor that the model does not hold; converts it if the dtype differs."""
    original = checkpoint.tensors[name]
    if original.dtype == tensor.dtype:
        with (checkpoint.directory / original.file).open("rb") as source:
            source.seek(original.start)
            with (target / tensor.file).open("r+b") as stream:
                stream.seek(tensor.start)
                for start in range(0, original.size, _COPIED_BYTES):
                    stream.write(source.read(min(_COPIED_BYTES, original.size - start)))
        return
    values: Any = np.array(checkpoint.read(name))
    scales = checkpoint.scales(name)
    if scales is not None:
        rows, columns = checkpoint.block
        wide = scales.repeat(rows, 0).repeat(columns, 1)[: values.shape[0], : values.shape[1]]
        values = values.astype(np.float32) * wide
    _write(target, tensor, values.astype(DTYPES[tensor.dtype]))
