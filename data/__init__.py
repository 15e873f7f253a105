"""Corpora, tokenizers, token shards, the order of samples, the loader, and synthetic tasks."""
