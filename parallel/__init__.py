"""Engines: who computes a step, on how many processes."""
