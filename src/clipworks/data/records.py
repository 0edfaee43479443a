"""What the fields of a record mean: which are texts, which is the label, whatever file they come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipworks.data.source import TextChoices
from clipworks.errors import DataError

SOURCES = ("alt", "synthetic", "short", "long", "region", "rewrite", "en", "de", "fr", "es", "zh")
"""The sources of texts that go by a name of their own."""

CAPTION_FIELDS = ("caption", "captions", "text", "txt")
"""What the sets in use call the text that came with the picture; it becomes `alt`."""


def texts_of(record: Mapping[str, Any], names: Mapping[str, str] | None = None) -> dict[str, TextChoices]:
    """The texts of a record by source.

    Args:
        record: field -> value; a text is a string or a list of strings, and empty ones do not count.
        names: for each source its field; None takes `SOURCES` under their names and the first of
            `CAPTION_FIELDS` as `alt`.

    Raises:
        DataError: if a field that should hold a text holds something else.
    """
    if names is None:
        names = {name: name for name in SOURCES if name in record}
        caption = next((field for field in CAPTION_FIELDS if field in record), None)
        if "alt" not in names and caption is not None:
            names["alt"] = caption
    texts: dict[str, TextChoices] = {}
    for name, field in names.items():
        value = record.get(field)
        if value is None:
            continue
        if isinstance(value, str):
            if value.strip():
                texts[name] = value
        elif isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value):
            kept = [text for text in value if text.strip()]
            if kept:
                texts[name] = kept
        else:
            raise DataError(f"{field} is a {type(value).__name__}, not a text or a list of texts")
    return texts


def label_of(value: Any) -> int:
    """A label as an index.

    Raises:
        DataError: if it is not a whole number from 0 on.
    """
    try:
        label = int(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"label {value!r} is not a whole number") from error
    if (isinstance(value, float) and value != label) or label < 0:
        raise DataError(f"label {value!r} is not a class index")
    return label
