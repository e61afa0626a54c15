"""What all answers have in common."""

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """No field is in an answer that is not named here. One that may be missing has a default."""

    model_config = ConfigDict(extra="forbid")


class Error(Answer):
    """`code` is for programs, `message` for people, with the numbers in it; `param` is the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    error: Error
