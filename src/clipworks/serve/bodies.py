"""Request bodies: JSON or a form, checked against one schema, and described so in the OpenAPI document."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar

from clipworks.serve.schemas import REQUESTS, Form

with suppress(ImportError):
    from fastapi import Request
    from pydantic import ValidationError
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException

B = TypeVar("B", bound=Form)
_NAMES = {
    *("input", "text", "image", "images", "model", "encoding_format", "dimensions", "user", "labels"),
    *("template", "k", "where", "kind", "classes", "name", "views"),
}
JSON, FORM = "application/json", "multipart/form-data"
_FILES, _FIELDS, _PART = 1000, 4000, 1 << 20
_PATH = re.compile(r"[/\\\x00-\x1f]|^\.\.?$")


class BadBody(Exception):
    """A body that does not keep its schema; `status` is 400 or 415."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


async def read(request: Request, schema: type[B]) -> B:
    """The body as its schema has it.

    Raises:
        BadBody: if it is neither JSON nor a form, or does not keep the schema.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().casefold()
    if kind == JSON:
        try:
            data = json.loads(await request.body(), parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise BadBody(f"the body is not JSON ({_first_line(error)})") from error
    elif kind == FORM:
        data = schema.of_form(await _form(request))
    else:
        raise BadBody(f"the body must be {JSON} or {FORM}, not {kind[:80] or 'of no type'}", 415)
    try:
        # A form has nothing but texts; in JSON a number is a number.
        return schema.model_validate(data, strict=kind == JSON)
    except ValidationError as error:
        raise BadBody(_said(error)) from error


def described(schema: type[Form]) -> dict[str, Any]:
    """What a route says of its body, for `openapi_extra`."""
    content = {
        JSON: {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}},
        FORM: {"schema": _form_schema(schema)},
    }
    return {"requestBody": {"required": True, "content": content}}


def components() -> dict[str, Any]:
    """The schemas that `described` refers to, by name."""
    found: dict[str, Any] = {}
    for schema in REQUESTS:
        whole = schema.model_json_schema(ref_template="#/components/schemas/{model}")
        found |= whole.pop("$defs", {})
        found[schema.__name__] = whole
    return found


def _form_schema(schema: type[Form]) -> dict[str, Any]:
    own = schema.model_json_schema(ref_template="#/components/schemas/{model}")
    file = {"type": "string", "format": "binary"}
    properties: dict[str, Any] = {}
    for name, field in own["properties"].items():
        if name in schema.files:
            continue
        if name in schema.several:
            text = {"type": "string", "minLength": 1}
            properties[name] = {"type": "array", "items": text, "description": field.get("description", "")}
        elif schema.other_files and name in own.get("required", ()):
            continue
        else:
            plain: dict[str, Any] = next((one for one in field.get("anyOf", ()) if one["type"] != "null"), {})
            properties[name] = {
                k: v for k, v in (field | plain).items() if k not in ("anyOf", "default", "title")
            }
    for name in schema.files:
        properties[name] = {"type": "array", "items": file} if name in schema.several else file
    required = [name for name in own.get("required", ()) if name in properties and name != "input"]
    extra: Any = False
    if schema.other_files:
        extra = {"type": "array", "items": file, "description": schema.other_files}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": extra}


async def _form(request: Request) -> dict[str, list[Any]]:
    try:
        form = await request.form(max_files=_FILES, max_fields=_FIELDS, max_part_size=_PART)
    except (HTTPException, ValueError) as error:  # the parser's own errors are ValueErrors
        raise BadBody(f"the form cannot be read ({getattr(error, 'detail', error)})") from error
    fields: dict[str, list[Any]] = {}
    try:
        for name, value in form.multi_items():
            # Nothing is ever opened or written by a file's name, and an honest client sends no path.
            if isinstance(value, UploadFile) and _PATH.search(value.filename or ""):
                raise BadBody("the name of a file holds a path; send its last part alone")
            content = await value.read() if isinstance(value, UploadFile) else value
            fields.setdefault(name, []).append(content)
    finally:
        await form.close()
    return fields


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _said(error: ValidationError) -> str:
    """Where and why, without what was sent."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    # Of a union every branch complains; the deepest one is what was meant.
    worst = max(found, key=lambda one: len(one["loc"]))
    last = worst["loc"][-1] if worst["type"] == "extra_forbidden" else ""
    return f"{_place(worst['loc'])}: {worst['msg'][:200]}" + (f" ({str(last)[:40]!r})" if last else "")


def _place(location: Sequence[int | str]) -> str:
    """Where in the body, without the names that pydantic gives to the branches of a union."""
    shown = ""
    for part in location:
        if isinstance(part, int):
            shown += f"[{part}]"
        elif part in _NAMES:
            shown += f".{part}"
    return shown.lstrip(".") or "body"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
