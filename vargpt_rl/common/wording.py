"""Tell text from strings that only have its type."""

import re

NO_TEXT = re.compile("[\0-\x08\x0e-\x1b\x7f\ud800-\udfff]")
"""Control characters, and half characters, which JSON can spell but UTF-8 cannot."""


def is_blank(text: str) -> bool:
    """Return whether a text has nothing to see: blanks and marks without width alone."""
    return not any(character.isprintable() and not character.isspace() for character in text)
