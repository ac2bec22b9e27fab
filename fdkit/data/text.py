"""Names and paths as text that is safe to show."""


def printable(text: str) -> str:
    """The text with control characters and undecodable bytes escaped, safe in logs and terminals."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
