"""The runner of the simulation: it counts the rare paths that steps go through."""

from collections import Counter

from server.engine.fake_masks import FakeMasks
from server.engine.fake_runner import FakeRunner, Known
from server.engine.plan import Plan


class Watchful(FakeRunner):
    """Counts what becomes of prompts that something is to be told of, and masks that are late."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        counts: Counter[str],
        masks: FakeMasks,
        most_logits: int,
    ) -> None:
        """most_logits: of one step."""
        super().__init__(num_blocks, block_size, vocab_size, masks)
        self._counts, self._most_logits = counts, most_logits

    def launch(self, plan: Plan) -> Known:
        assert sum(len(it.logit_positions) for it in plan) <= self._most_logits
        for it in plan:
            if it.of_prompt is not None:
                begun = it.lane.carried is not None
                self._counts["prompts told of in chunks"] += begun and it.start > 0
                self._counts["prompts begun anew"] += begun and it.start == 0
                self._counts["prompts pooled behind a prefix hit"] += not begun and it.start > 0
                assert begun or it.start == 0 or not it.of_prompt.needs_all_tokens
        self._counts["tokens fed back"] += sum(it.is_fed_back for it in plan)
        step = super().launch(plan)
        late = [lane for lane, output in step.by_lane.items() if output.is_late]
        self._counts["late masks"] += len(late)
        self._counts["late masks of several lanes"] += sum(len(lane.request.lanes) > 1 for lane in late)
        self._counts["prompts told of, and a late mask"] += sum(bool(step.by_lane[lane].of_prompt) for lane in late)
        return step
