"""Sequence mixers: which keys each query may meet, and the one attention operation that serves them all."""
