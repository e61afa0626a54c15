"""Random schemas through a served model: what ends by itself is valid, and nobody beside it gets other tokens."""

from collections.abc import Iterator

import pytest

from benchmarks.structured import mixed
from tests.support.live_server import LiveServer
from tests.support.random_schemas import schemas

pytestmark = pytest.mark.slow
COUNT, NEIGHBOURS = 40, 4


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    server = LiveServer(log=tmp_path_factory.mktemp("structured") / "log").wait_ready()  # no arguments: the demo
    yield server
    assert server.stop() == 0, server.output()


def test_answers_under_random_schemas_are_valid_and_change_nothing_for_others(server: LiveServer) -> None:
    outcomes, num_changed = mixed(server.url, schemas(COUNT, seed=1), NEIGHBOURS)
    for outcome in outcomes.values():
        assert outcome.problems == []
        assert outcome.valid > COUNT / 2, outcome
    assert num_changed == 0
    assert server.stats()["heddle_masks_total"] > 0
