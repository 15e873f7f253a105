"""What somebody may have put into a token dataset or a tokenizer: it is named, or it is one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from data.bpe import BpeTokenizer, read
from data.dataset import DOCUMENTS, FILES, META, TITLES, open_dataset, write_dataset
from data.disk import sha256_file, sha256_json
from data.document import Document, Split
from data.tokenizer import ByteTokenizer, CharacterTokenizer, from_json, tokenizer_hash
from tests.mutations import VALUES, fuzz, mutated, refusal

DIGEST = "0" * 64
METADATA = {
    "version": 2, "corpus": "text", "split": "all", "tokenizer": {"name": "bytes"},
    "tokenizer_sha256": tokenizer_hash(ByteTokenizer()), "tokens": 12, "documents": 2,
    "files": {name: {"bytes": 12, "sha256": DIGEST} for name in FILES},
}  # fmt: skip
LETTERS = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))]
BPE = BpeTokenizer([*LETTERS, "ab"], [["a", "b"]])
TOKENIZERS = [
    ByteTokenizer().to_json(), CharacterTokenizer("abc").to_json(), {"name": "numbers", "vocab_size": 3}, BPE.to_json(),
]  # fmt: skip


def made(folder: Path) -> Path:
    """A new dataset of two documents below `folder`."""
    if not (folder / "original").exists():
        (folder / "text").write_bytes(b"abcdef")
        text = Split((Document.whole(folder / "text"),) * 2)
        write_dataset(folder / "original", "text", "all", text, ByteTokenizer())
    return shutil.copytree(folder / "original", folder / "dataset", dirs_exist_ok=True)


def sign(folder: Path, meta: Any) -> None:
    """Writes meta.json with a right checksum and, where it has the place for them, right sizes and hashes."""
    if isinstance(meta, dict):
        for name, entry in meta["files"].items() if isinstance(meta.get("files"), dict) else ():
            if name in FILES and isinstance(entry, dict) and entry.get("sha256") == DIGEST:
                entry.update(bytes=(folder / name).stat().st_size, sha256=sha256_file(folder / name))
        meta["checksum"] = sha256_json(meta)
    (folder / META).write_text(json.dumps(meta))


def opens_or_says_why(folder: Path) -> None:
    said = refusal(lambda: open_dataset(folder))
    if said is None:
        dataset = open_dataset(folder)
        assert (len(dataset.tokens), dataset.bytes, len(dataset.titles)) == (12, 12, 2)
    else:
        assert said.startswith(str(folder))


@pytest.mark.fault(14, 16)
@fuzz(mutated(METADATA), 200, 10_000)
def test_any_metadata_with_a_right_checksum(meta: Any, folder: Path) -> None:
    sign(made(folder), meta)
    opens_or_says_why(folder / "dataset")


header = st.builds(
    "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}".format,
    st.sampled_from(["'<i8'", "'|O'", "'<f8'", "[('a', '<i8')]", "'<M8[s]'", "-" * 5000 + "1", "'|V0'", "'|S0'", "1"]),
    st.sampled_from(["False", "True", "[]", "__import__('os')"]),
    st.sampled_from(["(3,)", "(-3,)", "(0,)", "(2**62,)", "(9223372036854775807,)", "3", "()", "(3, 1)", "(" * 200]),
)
array = header.map(lambda text: b"\x93NUMPY\x01\x00" + len(text + "\n").to_bytes(2, "little") + text.encode() + b"\n")
content = st.one_of(
    st.binary(max_size=40), array, st.builds(bytes.__add__, array, st.binary(max_size=24)),
    VALUES.map(lambda value: json.dumps(value).encode()),
)  # fmt: skip


@pytest.mark.fault(14, 16)
@fuzz(st.tuples(st.sampled_from([DOCUMENTS, "document_bytes.npy", "document_words.npy", TITLES]), content), 300, 10_000)
def test_any_file_with_a_right_hash(drawn: tuple[str, bytes], folder: Path) -> None:
    name, forged = drawn
    meta = json.loads(json.dumps(METADATA))
    (made(folder) / name).write_bytes(forged)
    sign(folder / "dataset", meta)
    opens_or_says_why(folder / "dataset")


@pytest.mark.fault(16)
@fuzz(st.one_of(*map(mutated, TOKENIZERS)), 200, 10_000)
def test_any_fields_of_a_tokenizer(fields: Any, folder: Path) -> None:
    if refusal(lambda: from_json(fields)) is not None:
        return
    tokenizer = from_json(fields)
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert tokenizer_hash(from_json(tokenizer.to_json())) == tokenizer_hash(tokenizer)


@pytest.mark.fault(16)
@fuzz(mutated(BPE.to_file_json()), 200, 10_000)
def test_any_tokenizer_json(fields: Any, folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(fields))
    said = refusal(lambda: read(path))
    if said is None:
        tokenizer = read(path)
        assert tokenizer.decode(tokenizer.encode(b"abba, ab")) == b"abba, ab"
    else:
        assert said.startswith(f"data.tokenizer: {path}: ")
