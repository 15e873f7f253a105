"""A mixer without a definition does not slip through."""

from tests.conformance.oracle import missing


def test_a_missing_oracle_is_named() -> None:
    sentence = missing("nobody")
    assert sentence is not None
    assert "tests/conformance/oracles/nobody.py" in sentence
    assert missing("dense") is None
