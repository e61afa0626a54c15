"""What a name means that stands for several."""

from collections.abc import Awaitable, Callable

import pytest

from adapters_store.errors import (
    AdapterQuarantined,
)
from adapters_store.records import Target
from server.engine.messages import AdapterChecked
from server.lifecycle.models import meaning_of
from tests.support.adapters_alone import Adapters, register

Test = Callable[[Adapters], Awaitable[None]]


# -- aliases ---


def test_an_alias_divides_its_requests_by_weight_and_a_user_stays(run: Callable[..., None]) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        await register(it, "y", "b")
        await it.alias("z", (Target("x", 0.9), Target("y", 0.1)), "me")
        drawn = [meaning_of("z", it.catalog).model for _ in range(4000)]
        assert 0.07 < drawn.count("y") / 4000 < 0.13
        by_user = {str(user): meaning_of("z", it.catalog, str(user)).model for user in range(2000)}
        assert by_user == {user: meaning_of("z", it.catalog, user).model for user in by_user}
        assert 0.07 < list(by_user.values()).count("y") / 2000 < 0.13
        await it.alias("z", (Target("x", 0.8), Target("y", 0.2)), "me")
        moved = {user: meaning_of("z", it.catalog, user).model for user, was in by_user.items()}
        assert all(moved[user] == "y" for user, was in by_user.items() if was == "y")  # only the new tenth moves

    run(test)


def test_a_target_that_cannot_be_served_leaves_its_share_to_the_others(run: Callable[..., None]) -> None:
    async def test(it: Adapters) -> None:
        it.engine.checked = AdapterChecked(0, 1.0, 1.0)
        with pytest.raises(AdapterQuarantined):
            await register(it, "x", "a", verify=True)
        await it.alias("z", (Target("x", 1e6), Target("base", 1)), "me")
        assert meaning_of("z", it.catalog).model == "base"
        await it.alias("z", (Target("x"),), "me")
        with pytest.raises(AdapterQuarantined):
            meaning_of("z", it.catalog)

    run(test)
