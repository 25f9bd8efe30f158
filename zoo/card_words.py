"""Words that the sentences of cards share."""

from typing import Any

from zoo.card_data import PRIVATE


def of(data: dict[str, Any], before: str = "") -> str:
    """A data set with its fingerprint; a published record may have hidden its name."""
    name = " ".join(data.get("name", PRIVATE).split()).replace("`", "'")
    mark = f" (fingerprint `{data['fingerprint'][:16]}`)" if data.get("fingerprint") else ""
    return f"of {before}{'a private set' if name == PRIVATE else f'`{name}`'}{mark}"


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def were(number: int) -> str:
    return "was" if number == 1 else "were"


def has(number: int) -> str:
    return "has" if number == 1 else "have"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def paragraphs(*texts: str) -> str:
    return "\n\n".join(filter(None, texts))
