"""The description of the server holds for what it does, whatever is sent."""

import os
from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance

from serving import serving

EXAMPLES = int(os.environ.get("HAWK_FUZZ_EXAMPLES", "15"))  # make check-serving asks for more

KEY = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def server(tiny_bundle):
    with serving(tiny_bundle, max_tokens=16, api_keys=("secret",)) as running:
        yield running


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_answers_are_as_described_and_none_is_a_server_error(server, mode):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=KEY)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) >= 6
    for operation in operations:

        @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            # a schema cannot say that a prompt fits the model, or that a text is an image
            case.call_and_validate(headers=KEY, excluded_checks=[positive_data_acceptance])

        with suppress(Unsatisfiable):  # nothing can be wrong in what takes no input
            check()


def test_every_field_of_a_request_is_described(server):
    described = server.http.get("/openapi.json", headers=KEY).json()
    assert {"/v1/chat/completions", "/v1/models", "/health", "/ready", "/metrics"} <= set(described["paths"])
    components = described["components"]["schemas"]
    for name in ("ChatRequest", "Pruning"):
        for field, entry in components[name]["properties"].items():
            assert "description" in entry or "$ref" in entry or "anyOf" in entry, (name, field)
    chat = described["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) >= {"200", "400", "401", "404", "413", "429", "500", "503", "504"}
    assert chat["requestBody"]["content"]["application/json"]["examples"]
