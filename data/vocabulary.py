"""The tokenizer of a corpus. What takes long to train is kept in the cache, as a tokenizer.json."""

import json
from pathlib import Path

from data import bpe
from data.cache import cache_folder, open_or_make
from data.corpus import Corpus
from data.disk import sha256_file, sha256_json, sync_file, sync_folder
from data.tokenizer import Tokenizer, build_tokenizer

TOKENIZER, HASH = "tokenizer.json", "tokenizer.json.sha256"


def corpus_tokenizer(
    name: str, corpus: Corpus, vocab_size: int = 32_000, cache_dir: str | Path | None = None
) -> Tokenizer:
    """The tokenizer of that name (`data.tokenizer.build_tokenizer`), trained on the corpus if it depends on a text.

    cache_dir: None means `default_cache()`. ValueError if there is no such tokenizer, or the text or the cache will
    not do.
    """
    if name != "bpe":
        return build_tokenizer(name, corpus.split("train") if name == "characters" else None)
    text = corpus.split("train")
    key = sha256_json([bpe.SAMPLE_BYTES, vocab_size, [document.identity() for document in text.documents]])[:16]
    cache = cache_folder(cache_dir)
    try:
        return open_or_make(
            cache / f"{corpus.name}-bpe{vocab_size}-{key}",
            _open,
            lambda folder: _write(folder, bpe.train(text, vocab_size)),
        )
    except OSError as error:
        raise ValueError(f"data.cache: cannot write the tokenizer into {cache} ({error.strerror})") from error


def _open(folder: Path) -> bpe.BpeTokenizer:
    try:
        intact = sha256_file(folder / TOKENIZER) == (folder / HASH).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder}: a file cannot be read ({error})") from error
    if not intact:
        raise ValueError(f"{folder / TOKENIZER}: damaged, its sha256 is not the one of {HASH}")
    return bpe.read(folder / TOKENIZER)


def _write(folder: Path, tokenizer: bpe.BpeTokenizer) -> None:
    folder.mkdir()
    with (folder / TOKENIZER).open("wb") as file:
        file.write(json.dumps(tokenizer.to_file_json(), indent=0).encode())
        sync_file(file)
    with (folder / HASH).open("w") as hash_file:
        hash_file.write(sha256_file(folder / TOKENIZER))
    sync_folder(folder)
