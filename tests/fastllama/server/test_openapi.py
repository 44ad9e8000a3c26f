"""Requests that schemathesis makes from the server's own OpenAPI document: valid ones, and ones that break a rule.

Its phase "coverage" takes every field to its limits, beyond them, and to other types, and tries methods and headers
that the document does not have. Its phase "fuzzing" draws bodies.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from schemathesis.config import GenerationConfig, SchemathesisConfig
from schemathesis.engine import Status, events, from_schema
from schemathesis.engine.recorder import ScenarioRecorder

from fastllama import Llama, builtin_checkpoint
from fastllama.openai_api.known_fields import CHATS, COMPLETIONS, RESPONSES, BodyFields
from fastllama.server.guards import OPEN_PATHS
from fastllama.server.settings import ServerSettings
from tests.support.running_server import RunningServer, running_server

EXAMPLES = 20  # of each operation, in the phase "fuzzing"
MAX_SEQ_LEN = 32  # so that answers are short
ACCEPTANCE = "positive_data_acceptance"  # a request that the document allows is answered
# Rules that are not in the document. A request that it allows may be refused for them only.
OTHER_RULES = re.compile(
    "|".join(
        (
            "top_logprobs needs logprobs to be true",
            "max_tokens and max_completion_tokens are the same",
            "stream_options needs stream to be true",
            "min_tokens must be at most max_(completion_)?tokens",
            r"\(max_seq_len\) fit in the context",
            r"answers at a time|takes up to \d+ at a time",
            "token ids from 0 to",  # of the vocabulary
            "must be the id of a call in a message before it",
            "arguments must be the JSON text of an object",
            "tool_choice needs tools|must be one of the tools",
            r"tools\[\d+\].*\.name must differ from those before it",
            # The JSON schemas that a grammar supports.
            r"^tools(\[\d+\](\.function)?\.parameters)?(:| is nested too deeply)",
            r"^(response_format\.json_schema|text\.format)\.schema(:| is nested too deeply)",
            # For JSON Schema 8.0 is an integer. Here it is not.
            r"whole number .*, got -?\d+(\.0|e\+\d+)$|list of token ids, .*, got .*\d\.0",
            # schemathesis takes limits as floats, and the next ones lie beyond these.
            "a seed must be a whole number from",
        )
    )
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    llm = Llama.build(*builtin_checkpoint(), MAX_SEQ_LEN, 4, device="cpu")
    with running_server(llm, ServerSettings(max_queue=4)) as running:
        yield running


def checked(server: RunningServer, phase: str, **generation: Any) -> tuple[Counter[str], list[str]]:
    """How many checks of each name passed, and what failed."""
    document = httpx.get(f"{server.url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document, config=SchemathesisConfig(seed=1))
    config = schema.config
    config.update(base_url=server.url, continue_on_failure=True)
    config.generation = GenerationConfig(deterministic=True, no_shrink=True, database="none", **generation)
    for name in ("examples", "coverage", "fuzzing", "stateful"):
        getattr(config.phases, name).enabled = name == phase
    passed: Counter[str] = Counter()
    failed: list[str] = []
    for event in from_schema(schema).execute():
        if isinstance(event, events.FatalError | events.NonFatalError):
            failed.append(f"schemathesis: {event}")
        elif isinstance(event, events.ScenarioFinished):
            failed += failures_of(event.recorder)
            passed.update(
                node.name for nodes in event.recorder.checks.values() for node in nodes if node.status == Status.SUCCESS
            )
    return passed, failed


def failures_of(recorder: ScenarioRecorder) -> Iterator[str]:
    """What was asked and answered where a check failed, unless it was refused by one of OTHER_RULES."""
    for number, nodes in recorder.checks.items():
        case, interaction = recorder.cases[number].value, recorder.interactions.get(number)
        response = interaction.response if interaction else None
        content = response.content.decode(errors="replace") if response and response.content else ""
        message = json.loads(content)["error"]["message"] if content.startswith('{"error":') else ""
        for node in nodes:
            is_refused = node.name == ACCEPTANCE and OTHER_RULES.search(message)
            if node.status == Status.FAILURE and not is_refused:
                title = node.failure_info.failure.title if node.failure_info else node.name
                status = response.status_code if response else None
                yield f"{title}: {case.method} {case.formatted_path} {case.body!r:.600} -> {status} {content:.300}"


@pytest.mark.slow
def test_limits_of_every_field(server: RunningServer) -> None:
    passed, failed = checked(server, "coverage")
    assert not failed, "\n".join(failed[:20])
    names = {"not_a_server_error", "status_code_conformance", "response_schema_conformance", "unsupported_method"}
    assert all(passed[name] > 300 for name in {*names, "negative_data_rejection", ACCEPTANCE})
    server.wait_until_idle()


def test_routes_without_guards_do_not_document_their_errors(server: RunningServer) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    for path, routes in paths.items():
        for route in routes.values():
            assert ({"401", "429"} <= set(route["responses"])) == (path not in OPEN_PATHS)


@pytest.mark.parametrize(
    ("path", "known"), [("/v1/completions", COMPLETIONS), ("/v1/chat/completions", CHATS), ("/v1/responses", RESPONSES)]
)
def test_every_field_is_in_the_document(server: RunningServer, path: str, known: BodyFields) -> None:
    route = httpx.get(f"{server.url}/openapi.json").json()["paths"][path]["post"]
    properties = set(route["requestBody"]["content"]["application/json"]["schema"]["properties"])
    assert known.honoured | set(known.refused) == properties


def test_drawn_bodies(server: RunningServer) -> None:
    passed, failed = checked(server, "fuzzing", max_examples=EXAMPLES)
    assert not failed, "\n".join(failed[:20])
    assert passed["status_code_conformance"] > 100
    server.wait_until_idle()
