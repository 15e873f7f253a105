"""The manifest of a checkpoint: which files belong to it, and how each byte of them is known to be right.

`manifest.json` is the last file of a checkpoint to be written. It holds the format version, the step, what
the checkpoint was made from, and for each file its bytes and sha256; its `checksum` is the sha256 of its own
canonical JSON without that field, without which a flipped bit in the manifest would go unseen.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from lmtrain.files import HashingReader, HashingWriter

FORMAT = 1
NAME = "manifest.json"
STATE = "state.json"
MAX_BYTES = 16 << 20  # of a manifest; one with a thousand files has about 100 kB
STEP_FOLDER = re.compile(r"step-(0|[1-9][0-9]*)")
_KINDS: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "files": (dict,),
    "config": (str, NoneType),
    "dataset": (str, NoneType),
    "world": (int,),
    "versions": (dict,),
}
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # no separators, no leading dot, hence no `..`


@dataclass(frozen=True)
class FileEntry:
    """What a file of a checkpoint must be: size in bytes, and sha256 in hexadecimal digits."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of (`files`) and what it was made from.

    `config` and `dataset` are the hash and the fingerprint the caller gave, `world` the number of processes.
    """

    step: int
    files: Mapping[str, FileEntry]
    config: str | None = None
    dataset: str | None = None
    world: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def content(self) -> dict[str, Any]:
        """What is written, but for the checksum."""
        return {"format": FORMAT, **asdict(self)}

    @property
    def checksum(self) -> str:
        """sha256 of the content, which holds the hash of every file: identifies the checkpoint."""
        return _checksum(self.content)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` into `folder`, durably."""
    content = {**manifest.content, "checksum": manifest.checksum}
    with HashingWriter(folder / NAME) as writer:
        writer.write(_text(content))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint at `folder`; ValueError if there is none, or not an intact one."""
    if not folder.is_dir():
        raise ValueError("there is no such folder")
    with _blaming(NAME), HashingReader(folder / NAME) as reader:
        if reader.size > MAX_BYTES:
            raise ValueError(f"{reader.size} bytes are too many")
        return _parse(reader.read(reader.size))


def verify(folder: Path) -> list[str]:
    """What is wrong with the checkpoint at `folder`, a line for each file; [] if every byte is as written."""
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    named = STEP_FOLDER.fullmatch(folder.name)
    if named and int(named[1]) != manifest.step:
        return [f"{NAME}: it is of step {manifest.step}, in a folder named {folder.name}"]
    problems = []
    for name, entry in manifest.files.items():
        try:
            with checked(folder, name, entry):
                pass
        except ValueError as error:
            problems.append(str(error))
    return problems


@contextmanager
def checked(folder: Path, name: str, entry: FileEntry) -> Iterator[HashingReader]:
    """A file of a checkpoint, to be read in the body.

    ValueError, naming it, if it is missing or of another size, if it cannot be read, or if at the end its
    bytes are not those that were written: whatever the body made of it must not be used before.
    """
    with _blaming(name), HashingReader(folder / name) as reader:
        if reader.size != entry.bytes:
            raise ValueError(f"{reader.size} bytes, the manifest says {entry.bytes}")
        yield reader
        reader.skim()
        if reader.sha256() != entry.sha256:
            raise ValueError("its sha256 is not the manifest's: the file changed after it was written")


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Turns whatever goes wrong while a file is read into a ValueError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{name}: missing") from None
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error.strerror or error}") from None
    except RecursionError:
        raise ValueError(f"{name}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _text(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _parse(text: bytes) -> Manifest:
    content = json.loads(text)
    if not isinstance(content, dict) or "checksum" not in content:
        raise ValueError("not a manifest")
    if content.get("format") != FORMAT:
        raise ValueError(f"format {content.get('format')!r}; this version reads format {FORMAT}")
    if content["checksum"] != _checksum(content) or text != _text(content):  # not a blank may differ
        raise ValueError("its checksum does not fit its content: the file changed after it was written")
    if wrong := [key for key, kinds in _KINDS.items() if type(content.get(key, ...)) not in kinds]:
        raise ValueError(f"malformed: {', '.join(wrong)} missing, or of another type")
    if content["step"] < 0 or content["world"] < 1:
        raise ValueError(f"malformed: step {content['step']} of {content['world']} processes")
    if not all(type(version) is str for version in content["versions"].values()):
        raise ValueError("malformed: versions must be texts")
    files = {name: _entry(name, fields) for name, fields in content["files"].items()}
    if STATE not in files:
        raise ValueError(f"it lists no {STATE}")
    return Manifest(**{key: content[key] for key in _KINDS} | {"files": files})


def _entry(name: str, fields: Any) -> FileEntry:
    if not _PLAIN.fullmatch(name):
        raise ValueError(f"{name!r} is not a plain file name")
    if not isinstance(fields, dict) or [type(fields.get(key)) for key in ("bytes", "sha256")] != [int, str]:
        raise ValueError(f"malformed: it does not say bytes and sha256 of {name}")
    return FileEntry(fields["bytes"], fields["sha256"])


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
