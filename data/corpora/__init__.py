"""Corpora by name. A new one is one file of this folder, with one function `Source -> Corpus`, and its entry here."""

from data.corpora import hub, iid, jsonl, pg19, stdlib, streams, text, wikitext
from data.corpora.contract import CorpusKind

CORPORA: dict[str, CorpusKind] = {
    "text": CorpusKind(text.text, ("path", "validation")),
    "jsonl": CorpusKind(jsonl.jsonl, ("path", "validation", "column")),
    "hub": CorpusKind(hub.hub, ("path", "validation", "column", "subset", "split", "revision", "streaming")),
    "enwik8": CorpusKind(streams.enwik8, ("path",)),
    "text8": CorpusKind(streams.text8, ("path",)),
    "pg19": CorpusKind(pg19.pg19, ("path", "revision", "streaming")),
    "wikitext2": CorpusKind(wikitext.wikitext2, ("path",)),
    "wikitext103": CorpusKind(wikitext.wikitext103, ("path",)),
    "stdlib": CorpusKind(stdlib.stdlib, ("validation",)),
    "iid": CorpusKind(iid.iid, ("validation", "alphabet")),
}
