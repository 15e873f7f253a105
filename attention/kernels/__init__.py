"""Triton kernels, each beside what it needs alone: its plan of tiles and its static table of configurations."""
