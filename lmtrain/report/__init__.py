"""One page that says what a comparison of runs found, with its figures and tables beside it."""
