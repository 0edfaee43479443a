"""The OpenAPI document is complete: whatever it allows is answered as it says, and never by a fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from tests.serve.client import Client

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = 25


@pytest.fixture(scope="module")
def running(serving: Callable[..., Any], index: Any) -> Iterator[Client]:
    from clipworks.serve import Limits

    with serving(Limits(body=1 << 20, grace=0), index=index, name="tiny") as client:
        yield client


@pytest.fixture(scope="module")
def document(running: Client) -> Any:
    return running.get("/openapi.json").json


def test_every_operation_says_what_it_takes_and_every_answer_it_gives(document: dict[str, Any]) -> None:
    paths = {
        (method, path): operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    assert {path for _, path in paths} == {
        *("/v1/embeddings", "/classify", "/segment", "/search", "/thumbnail", "/fewshot", "/fewshot/{id}"),
        *("/models", "/healthz", "/metrics"),
    }
    for (method, path), operation in paths.items():
        assert operation["description"], path
        assert "405" in operation["responses"], path
        assert any(status.startswith("2") for status in operation["responses"]), path
        if method == "post":
            assert set(operation["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
            assert {"400", "401", "413", "415", "429", "503"} <= set(operation["responses"])
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"], name


# Starlette leaves the file of a form that ends too early to the garbage collector, which says so.
@pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.SpooledTemporaryFile")
def test_nothing_that_the_document_allows_or_forbids_is_a_fault(running: Client, document: Any) -> None:
    from hypothesis import HealthCheck, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=f"http://127.0.0.1:{running.port}")
    wanted = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_headers_conformance,
        checks.response_schema_conformance,
    ]
    asked = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @_given(operation, mode)
            def check(case: Any) -> None:
                nonlocal asked
                asked += 1
                case.call_and_validate(checks=wanted, timeout=60)

            # What takes nothing cannot be asked wrongly.
            with suppress(*([Unsatisfiable] if mode == schemathesis.GenerationMode.NEGATIVE else [])):
                check()
    assert asked > 100


def _given(operation: Any, mode: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    from hypothesis import given

    return given(case=operation.as_strategy(generation_mode=mode))
