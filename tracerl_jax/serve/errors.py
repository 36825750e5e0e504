"""What a client is told when a request fails, in the form that OpenAI's API has."""


class ApiError(Exception):
    """An answer with an error status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict:
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}


def _type(status: int) -> str:
    known = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error", 504: "timeout_error"}
    return known.get(status, "invalid_request_error" if status < 500 else "server_error")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def overloaded(capacity: int) -> ApiError:
    message = f"the server holds {capacity} samples, running and waiting, and is full; try again later"
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", headers={"Retry-After": "5"})


def timed_out(seconds: float) -> ApiError:
    message = f"not done within the server's limit of {seconds:g} s; lower max_tokens or n, or try again later"
    return ApiError(504, message, code="timeout")


def engine_failed() -> ApiError:
    return ApiError(500, "the engine failed while this request ran; the server's log says why", code="engine_failure")
