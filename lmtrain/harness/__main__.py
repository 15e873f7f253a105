"""The command line of lm-evaluation-harness, which then knows the model `lmtrain`."""

import lmtrain.harness.adapter  # noqa: F401 - registers it


def main() -> None:
    """Hand over to the harness."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
