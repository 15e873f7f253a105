"""Reading code blocks out of the repository's own documents, so that tests can execute them."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def code_blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language in a page of the repository, in order."""
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)
