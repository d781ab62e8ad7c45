"""The server against its own OpenAPI schema, by schemathesis: no 500, no status or body that it does not name."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings

from vistok.serve.app import create_app
from vistok.serve.limits import Limits
from vistok.serve.media import MediaPolicy
from vistok.serve.service import Settings

schemathesis = pytest.importorskip("schemathesis")

from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CASES = 150
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
CHAT = "/v1/chat/completions"
PATHS = (CHAT, "/v1/models", "/v1/models/{name}", "/healthz", "/readyz", "/metrics")
QUIET: dict[str, Any] = {"deadline": None, "database": None, "derandomize": True} | {
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate],
}
LIMITS = Limits(request_bytes=100_000, picture_bytes=50_000, new_tokens=4, picture_pixels=10_000, picture_side=1_000)
SETTINGS = Settings(max_new_tokens=4, media=MediaPolicy(LIMITS))


@pytest.fixture(scope="module")
def application() -> Any:
    app = create_app(SETTINGS, wait=True)
    with TestClient(app):  # loads the model
        yield app


@pytest.fixture
def api(application: Any) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", application)


@pytest.mark.parametrize(
    ("path", "mode"),
    [*((path, GenerationMode.POSITIVE) for path in PATHS), (CHAT, GenerationMode.NEGATIVE)],
    ids=lambda value: getattr(value, "value", value),
)
def test_what_the_schema_allows_and_what_it_does_not(api: Any, path: str, mode: Any) -> None:
    method = "POST" if path == CHAT else "GET"

    @settings(max_examples=CASES if path == CHAT else 20, **QUIET)
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    check()


def test_all_paths_are_tried(api: Any) -> None:
    assert {operation.ok().path for operation in api.get_all_operations()} == set(PATHS)
