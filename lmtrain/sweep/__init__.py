"""Sweeps: many runs that differ in a few settings, planned, run and compared as one."""
