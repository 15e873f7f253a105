"""Tensors in the safetensors format, written and read in one pass.

A file (github.com/huggingface/safetensors, "Format") is an 8-byte little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, and the bytes of all tensors without gaps. We write and read it
ourselves because the library hashes nothing and reads by mapping: here every byte is hashed as it passes, and
beside the tensors themselves memory holds one of them at a time at most (its copy on the CPU, if it lives on
a device).

Tensors that share all their memory (a tied head) are stored once, under their first name; the other names
stand in the header's metadata and come back as the same tensor.
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmtrain.files import HashingReader, HashingWriter

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def memory_of(tensor: Tensor) -> tuple[object, ...]:
    """The same for tensors that share all their memory. The storage itself, not its address: on the meta device all
    addresses are 0."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in CPU memory of their own; those that share all their memory share that of one copy."""
    copies: dict[tuple[object, ...], Tensor] = {}
    for tensor in tensors.values():
        if (memory := memory_of(tensor)) not in copies:
            copies[memory] = tensor.detach().to("cpu", copy=True)
    return {name: copies[memory_of(tensor)] for name, tensor in tensors.items()}


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size in bytes of the file that `write_tensors` would write."""
    header, stored = _layout(tensors)
    return len(header) + sum(tensor.nbytes for tensor in stored)


def write_tensors(writer: HashingWriter, tensors: Mapping[str, Tensor]) -> None:
    """Writes `tensors`, on any device, of the types in `DTYPES`."""
    header, stored = _layout(tensors)
    writer.write(header)
    for tensor in stored:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        writer.write(flat.view(torch.uint8).numpy().data)


def read_tensors(reader: HashingReader) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU.

    ValueError unless its header describes exactly the bytes that follow, which is checked before memory is
    taken for any tensor.
    """
    entries, tied = _parse(*_read_header(reader))
    tensors = {}
    for begin, end, name, dtype, shape in entries:
        data = torch.empty(end - begin, dtype=torch.uint8)
        reader.read_into(data.numpy().data)
        tensors[name] = data.view(dtype).reshape(shape)
    return tensors | {alias: tensors[name] for alias, name in tied.items()}


def _layout(tensors: Mapping[str, Tensor]) -> tuple[bytes, list[Tensor]]:
    """The header, and the tensors in the order of their bytes: wide types first, so that all are aligned."""
    first: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        assert name != "__metadata__", "a name the format reserves"
        memory = memory_of(tensor)
        if tensor.numel() and memory in first:
            tied[name] = first[memory]
        else:
            first[memory] = name
            stored[name] = tensor
    order = sorted(stored, key=lambda name: -stored[name].itemsize)
    header: dict[str, Any] = {"__metadata__": {"tied": json.dumps(tied)}} if tied else {}
    offset = 0
    for name in order:
        tensor = stored[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text, [stored[name] for name in order]


def _read_header(reader: HashingReader) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes follow it."""
    if reader.size < 8:
        raise ValueError("too short for a safetensors file")
    (length,) = struct.unpack("<Q", reader.read(8))
    if length > min(reader.size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"a header of {length} bytes in a file of {reader.size}")
    try:
        header = json.loads(reader.read(length))
    except (ValueError, RecursionError):
        raise ValueError("the header is not JSON: not a safetensors file") from None
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    return header, reader.size - 8 - length


class _Entry(NamedTuple):
    begin: int  # of its bytes, after the header
    end: int
    name: str
    dtype: torch.dtype
    shape: list[int]


def _parse(header: dict[str, Any], data_bytes: int) -> tuple[list[_Entry], dict[str, str]]:
    """The tensors in the order of their bytes, and the tied names: alias -> name."""
    try:
        tied = json.loads(header.pop("__metadata__", {}).get("tied", "{}"))
        ties_fit = set(tied.values()) <= set(header) and set(tied).isdisjoint(header)
        entries = []
        for name, fields in header.items():
            begin, end = fields["data_offsets"]
            entries.append(_Entry(begin, end, name, DTYPES[fields["dtype"]], list(fields["shape"])))
        entries.sort()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the header is malformed: {error!r}") from None
    if not ties_fit:
        raise ValueError("the header ties a name to no tensor")
    position = 0
    for begin, end, name, dtype, shape in entries:
        sizes_fit = all(type(size) is int and 0 <= size < 2**63 for size in (begin, end, *shape))
        if not sizes_fit or begin != position or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name!r} of shape {shape} cannot have the bytes {begin} to {end}")
        position = end
    if position != data_bytes:
        raise ValueError(f"the header describes {position} bytes of tensors, the file has {data_bytes}")
    return entries, tied
