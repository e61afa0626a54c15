"""What /openapi.json says is what the server does: a share of `make schemathesis`, the same requests in every run."""

from pathlib import Path

import pytest

from tests.support.breadth import always
from tests.support.schema_run import PHASES, make_server, run
from tests.support.served import settle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("examples", always([1, 2], 1))
def test_the_server_keeps_to_its_own_document(tmp_path: Path, examples: int) -> None:
    server = make_server(tmp_path).wait_ready()
    try:
        outcome = run(server, tmp_path, seed=1, examples=examples)
        assert not outcome.failures, "\n".join(outcome.failures[:20])
        assert outcome.num_cases > 2000
        for phase in PHASES:
            assert sum(it.by_phase[phase] for it in outcome.operations.values())
        # nearly all that is sound is taken where nothing need be there before
        for label in ("POST /v1/completions", "POST /v1/embeddings", "POST /tokenize"):
            assert outcome.operations[label].num_taken >= outcome.operations[label].num_sound / 2
        settle(server)
    finally:
        assert server.stop() == 0, server.output()
