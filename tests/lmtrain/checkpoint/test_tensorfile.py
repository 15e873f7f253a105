"""The safetensors files of checkpoints, against the library itself as the oracle."""

import hashlib
import json
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtrain.checkpoint.tensorfile import DTYPES, file_bytes, read_tensors, write_tensors
from lmtrain.files import HashingReader, HashingWriter


def write(path, tensors):
    with HashingWriter(path) as writer:
        write_tensors(writer, tensors)
    return writer


def read(path):
    with HashingReader(path) as reader:
        return read_tensors(reader)


def raw(tensor):
    """The bytes of a tensor: NaN payloads and signed zeros count too."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def every_kind():
    random_bytes = torch.randint(0, 256, (48,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensors = {name: random_bytes.view(dtype).clone() for name, dtype in DTYPES.items() if name != "BOOL"}
    return tensors | {
        "BOOL": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "transposed": torch.arange(6).reshape(2, 3).t(),
        "strided": torch.arange(10.0)[::3],
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
        "name with blanks, ümlauts.and.dots": torch.tensor([-0.0, float("nan"), float("inf"), 1e-45]),
    }


def test_every_dtype_and_layout_comes_back_bit_for_bit(tmp_path):
    tensors = every_kind()
    write(tmp_path / "a", tensors)
    for loaded in (read(tmp_path / "a"), load_file(tmp_path / "a")):
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert loaded[name].shape == tensor.shape
            assert raw(loaded[name]) == raw(tensor)


def test_reads_what_the_library_writes(tmp_path):
    tensors = {name: tensor.detach().contiguous() for name, tensor in every_kind().items()}
    save_file(tensors, tmp_path / "a", metadata={"format": "pt"})
    loaded = read(tmp_path / "a")
    assert {name: raw(tensor) for name, tensor in loaded.items()} == {n: raw(t) for n, t in tensors.items()}


def test_counts_and_hashes_exactly_the_bytes_of_the_file(tmp_path):
    writer = write(tmp_path / "a", every_kind())
    content = (tmp_path / "a").read_bytes()
    assert writer.bytes == len(content) == file_bytes(every_kind())
    assert writer.sha256() == hashlib.sha256(content).hexdigest()
    with HashingReader(tmp_path / "a") as reader:
        read_tensors(reader)
        assert reader.sha256() == writer.sha256()


@pytest.mark.parametrize("length", range(1, 9))
def test_tensors_are_aligned(tmp_path, length):
    """As the format asks: the bytes begin at a multiple of 8, and wide types stand before narrow ones."""
    write(
        tmp_path / "a",
        {"n" * length: torch.ones(3, dtype=torch.uint8), "wide": torch.ones(2, dtype=torch.int64)},
    )
    content = (tmp_path / "a").read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    assert header_bytes % 8 == 0
    assert json.loads(content[8 : 8 + header_bytes])["wide"]["data_offsets"] == [0, 16]


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path):
    weight = torch.randn(100, 10)
    tensors = {
        "embedding": weight,
        "other": torch.randn(3),
        "head": weight,
        "rows": weight[:50],
        "view": weight.t(),
    }
    write(tmp_path / "a", tensors)
    assert set(load_file(tmp_path / "a")) == {
        "embedding",
        "other",
        "rows",
        "view",
    }  # first name; views are their own
    loaded = read(tmp_path / "a")
    assert loaded["head"] is loaded["embedding"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_tensors_larger_than_a_piece_of_writing(tmp_path, monkeypatch):
    monkeypatch.setattr("lmtrain.files.CHUNK", 1000)
    tensor = torch.randn(777, 3)
    write(tmp_path / "a", {"a": tensor})
    assert torch.equal(read(tmp_path / "a")["a"], tensor)


def file_of(header, data=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 9) + b"{}",
        file_of(b"{"),
        file_of(b"\xff\xfe"),
        file_of(b"[" * 100_000),
        file_of([]),
        file_of({}),
        file_of({"a": 1}),
        file_of({"a": {}}),
        file_of({"a": entry(shape=[3])}),
        file_of({"a": entry(shape=[2**62, 2**62])}),
        file_of({"a": entry(shape=[-2])}),
        file_of({"a": entry(shape=[-1, -2])}),
        file_of({"a": entry(shape=[2.0])}),
        file_of({"a": entry(shape=[True, 2])}),
        file_of({"a": entry(shape="2")}),
        file_of({"a": entry(shape=None)}),
        file_of({"a": entry(shape=[0, 2**70], offsets=[0, 0])}, b""),
        file_of({"a": entry(dtype="F31")}),
        file_of({"a": entry(dtype=["F32"])}),
        file_of({"a": entry(offsets=[0.0, 8.0])}),
        file_of({"a": entry(offsets=[0, 8, 9])}),
        file_of({"a": entry(offsets=[0, float("inf")])}),
        file_of({"a": entry(offsets=[8, 16])}),
        file_of({"a": entry(offsets=[-8, 0])}),
        file_of({"a": entry(), "b": entry()}),  # two tensors over the same bytes
        file_of({"a": entry(), "b": entry(offsets=[16, 24])}, bytes(24)),  # a hole
        file_of({"a": entry()}, bytes(9)),
        file_of({"a": entry(), "__metadata__": {"tied": '{"b": "c"}'}}),
        file_of({"a": entry(), "__metadata__": {"tied": '{"a": "a"}'}}),
        file_of({"a": entry(), "__metadata__": {"tied": "[]"}}),
        file_of({"a": entry(), "__metadata__": {"tied": '{"b": ["a"]}'}}),
        file_of({"a": entry(), "__metadata__": []}),
    ],
)
def test_a_header_that_does_not_describe_the_file_is_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=r"header|tensor|short"):
        read(tmp_path / "a")


@pytest.mark.fault(4)
def test_no_content_whatever_raises_anything_but_valueerror(tmp_path):
    write(tmp_path / "a", {"first": torch.randn(2, 3), "second": torch.arange(4)})
    content = (tmp_path / "a").read_bytes()
    length = 8 + struct.unpack("<Q", content[:8])[0]
    draw = random.Random(0)
    refused = 0
    for count in range(1000):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(length)] = draw.choice(b'0123456789-.eE"{}[],: FIB\x00\xff')
        (tmp_path / f"changed {count}").write_bytes(changed)
        try:
            read(tmp_path / f"changed {count}")
        except ValueError:
            refused += 1
    assert refused > 800
