"""Errors in the shape of OpenAI's API."""

from typing import Any


class InvalidRequest(ValueError):
    """A request that cannot be answered as it is."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param  # the field of the body
        self.code = code

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's API returns it."""
        return {
            "error": {
                "message": str(self),
                "type": "invalid_request_error",
                "param": self.param,
                "code": self.code,
            }
        }


class AnswerFailed(RuntimeError):
    """An answer that ended with an error of the model."""
