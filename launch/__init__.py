"""Whatever starts a run: the command line."""
