"""Whether a model shall reason before it answers: templates have a variable for that, under several names."""

from collections.abc import Collection, Mapping
from typing import Any

from server.errors import InvalidRequest

_SWITCHES = ("enable_thinking", "thinking")


def switched(
    thinks: bool | None, variables: Mapping[str, Any], read: Collection[str], reasons: bool
) -> Mapping[str, Any]:
    """The variables, with the one that says so. `thinks` None: as the template has it by itself. `read`: what it reads;
    `reasons`: whether it knows reasoning at all.

    Raises InvalidRequest where it goes its own way.
    """
    switch = next((it for it in _SWITCHES if it in read), None)
    if thinks is None or switch in variables or ("reasoning_effort" in variables and "reasoning_effort" in read):
        return variables
    if switch is not None:
        return {**variables, switch: thinks}
    if thinks == reasons:
        return variables
    told = "always has the model reason" if reasons else "has no place for reasoning"
    raise InvalidRequest(
        f"this model's chat template {told}, and reads none of {', '.join(_SWITCHES)}; leave that to the model",
        param="thinking",
        code="unsupported_parameter",
    )
