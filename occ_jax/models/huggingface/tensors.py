"""The tensors of a directory of safetensors files, read one by one.

Owns the file format (index, headers, offsets, block-scaled FP8) and every error about it. `names`
owns what the tensors mean. The safetensors library opens and checks every file. The bytes of a
tensor are then memory-mapped by the offsets in the header, because the library's numpy interface
does not support float8.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from occ_jax.errors import UserError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALE_SUFFIX = "_scale_inv"

Json = dict[str, Any]

# Name of a dtype in the format -> the dtype. Parameters may be stored in these.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}


class Tensor(NamedTuple):
    """File, offset, dtype and shape of one tensor."""

    file: str
    dtype: str  # its name in the format
    shape: tuple[int, ...]
    start: int  # offset of its bytes in the file
    size: int  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face directory of which config and headers are in memory, and no tensor."""

    directory: Path
    config: Json
    """The content of config.json."""
    tensors: dict[str, Tensor]
    """By name, ordered by file and offset."""
    headers: dict[str, bytes]
    """The bytes of every file before its first tensor."""

    def where(self, name: str) -> str:
        """File and tensor, for messages."""
        return f"{self.directory / self.tensors[name].file}: tensor {name}"

    def read(self, name: str) -> np.ndarray:
        """A tensor's values, memory-mapped: only the slices that are used are read."""
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{self.where(name)} has type {tensor.dtype}; it must be one of {', '.join(DTYPES)}"
            )
        dtype = DTYPES[tensor.dtype]
        if not tensor.size:
            return np.zeros(tensor.shape, dtype)
        path = self.directory / tensor.file
        return np.memmap(path, dtype, mode="r", offset=tensor.start, shape=tensor.shape)

    def scale_of(self, name: str) -> str | None:
        """The name of the tensor with the scales of an FP8 tensor; None for other dtypes.

        Raises:
            UserError: an FP8 tensor has no scales, or scales of the wrong shape.
        """
        if self.tensors[name].dtype != "F8_E4M3":
            return None
        scale = name + SCALE_SUFFIX
        if scale not in self.tensors:
            raise UserError(f"{self.where(name)} is FP8 and has no scales {scale}")
        shape = self.tensors[name].shape
        if len(shape) != 2:
            raise UserError(
                f"{self.where(name)} is FP8 of shape {list(shape)}; only matrices may be"
            )
        rows, columns = self.block
        expected = (-(-shape[0] // rows), -(-shape[1] // columns))
        if self.tensors[scale].shape != expected:
            raise UserError(
                f"{self.where(scale)} has shape {list(self.tensors[scale].shape)}; blocks of "
                f"{rows} x {columns} make it {list(expected)}"
            )
        return scale

    def scales(self, name: str) -> np.ndarray | None:
        """The scales of an FP8 tensor, float32 [blocks of rows, blocks of columns]; else None."""
        scale = self.scale_of(name)
        return None if scale is None else np.array(self.read(scale), np.float32)

    @property
    def block(self) -> tuple[int, int]:
        """Number of rows and columns of a block that has one scale."""
        settings = self.config.get("quantization_config")
        size = settings.get("weight_block_size") if isinstance(settings, dict) else None
        valid = isinstance(size, list) and len(size) == 2  # pyright: ignore[reportUnknownArgumentType]
        if not valid or not all(isinstance(n, int) and n > 0 for n in cast("list[object]", size)):
            raise UserError(
                f"{self.directory / CONFIG}: quantization_config.weight_block_size is {size!r}; "
                "it must be [rows, columns], as there are FP8 tensors"
            )
        rows, columns = cast("list[int]", size)
        return rows, columns


def is_pretrained(directory: Path) -> bool:
    """Whether this is a Hugging Face directory; a run has a config.json of another kind."""
    try:
        return "model_type" in json.loads((directory / CONFIG).read_text())
    except (OSError, ValueError):
        return False


def read_json(path: Path) -> Json:
    """Reads a JSON file that holds an object.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid JSON: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values


def read_config_json(directory: Path) -> Json:
    """Reads config.json of a checkpoint directory.

    Raises:
        UserError: this is not a checkpoint directory.
    """
    if not directory.is_dir():
        raise UserError(f"no checkpoint directory {directory}")
    if not (directory / CONFIG).is_file():
        raise UserError(
            f"{directory} holds no {CONFIG}; it is no Hugging Face checkpoint directory"
        )
    return read_json(directory / CONFIG)


def read_names(directory: Path) -> dict[str, str]:
    """The file of every tensor, from the index or from the header of the only file.

    Raises:
        UserError: there is neither, or the index is damaged.
    """
    path = directory / INDEX
    if path.is_file():
        names = read_json(path).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(f, str) for f in names.values()):
            raise UserError(f"{path}: weight_map is no object of file names")
        return names
    if not (directory / SINGLE).is_file():
        raise UserError(f"{directory} holds neither {INDEX} nor {SINGLE}")
    return dict.fromkeys(_read_header(directory / SINGLE, "")[1], SINGLE)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Reads config.json, index and headers, and checks that they agree.

    Raises:
        UserError: they are missing, damaged or contradictory; the message names file and tensor.
    """
    config, names = read_config_json(directory), read_names(directory)
    tensors: dict[str, Tensor] = {}
    headers: dict[str, bytes] = {}
    for file in sorted(set(names.values())):
        wanted = next(name for name, its_file in names.items() if its_file == file)
        path = directory / file
        if Path(file).name != file:
            raise UserError(f"{directory / INDEX}: tensor {wanted} is in {file!r}, no file name")
        if not path.is_file():
            raise UserError(f"{path} is missing; {INDEX} says it holds tensor {wanted} and others")
        headers[file], in_file = _read_header(path, wanted)
        for name, tensor in in_file.items():
            if name in tensors or names.get(name, file) != file:
                other = tensors[name].file if name in tensors else names[name]
                raise UserError(f"{path} and {directory / other} both claim tensor {name}")
            tensors[name] = tensor
    for name, file in names.items():
        if name not in tensors:
            raise UserError(f"{directory / file} lacks tensor {name}, which {INDEX} says it holds")
    return Checkpoint(directory, config, tensors, headers)


def _read_header(path: Path, wanted: str) -> tuple[bytes, dict[str, Tensor]]:
    """The bytes before the first tensor, and the tensors by offset; the library checks the file."""
    about = f" (it should hold tensor {wanted})" if wanted else ""
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        cut = _first_cut(path)
        if cut:
            raise UserError(
                f"{path} is truncated: the bytes of tensor {cut} are incomplete"
            ) from None
        raise UserError(f"{path} is no valid safetensors file{about}: {error}") from error
    header, entries = _parse_header(path)
    tensors: dict[str, Tensor] = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        (start, end), shape = entry["data_offsets"], tuple(entry["shape"])
        size = end - start
        tensors[name] = Tensor(path.name, entry["dtype"], shape, len(header) + start, size)
    return header, tensors


def _parse_header(path: Path) -> tuple[bytes, dict[str, Json]]:
    with path.open("rb") as file:
        length = file.read(8)
        text = file.read(int.from_bytes(length, "little"))
    entries = json.loads(text)
    entries.pop("__metadata__", None)
    return length + text, entries


def _first_cut(path: Path) -> str | None:
    """The first tensor whose bytes reach beyond the end of the file; None if there is none."""
    try:
        size = path.stat().st_size
        if int.from_bytes(path.open("rb").read(8), "little") > size:
            return None
        header, entries = _parse_header(path)
        ends = {name: len(header) + entry["data_offsets"][1] for name, entry in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
    cut = [name for name, end in ends.items() if end > size]
    return min(cut, key=lambda name: ends[name], default=None)
