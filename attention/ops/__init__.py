"""Shared operations of the mixers: each file holds one operation, its definition and its fast path."""
