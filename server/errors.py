"""Errors of the server and their OpenAI form.

ServerError                (status, code, param)
├── BadRequestError        400 invalid_request_error
│   └── ContextLengthError 400 context_length_exceeded
├── PayloadTooLargeError   413
├── RequestTimeoutError    408
├── AuthenticationError    401 invalid_api_key
├── PermissionDeniedError  403
├── UnsupportedMediaTypeError 415
├── NotFoundError          404
├── ConflictError          409
├── QueueFullError         429 with Retry-After
├── NotReadyError          503
├── StorageError           507 storage_failed: the disk is full or read-only
├── ConfigError            at start only: config.yaml, environment, command line
├── ModelError             at start only: a model that is missing, unreachable or of an unsupported kind
└── ServiceError           `vecinfer service` only: what cannot be installed, removed or asked, and the remedy
"""

from __future__ import annotations


class ServerError(Exception):
    """Base: an error with an HTTP status, an OpenAI type and code, and the parameter it is about."""

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class BadRequestError(ServerError):
    """The request is malformed or asks for something unsupported."""

    status = 400
    type = "invalid_request_error"


class ContextLengthError(BadRequestError):
    """Prompt and max_tokens can never fit the model's context or the pool."""

    code = "context_length_exceeded"


class PayloadTooLargeError(ServerError):
    """The body is larger than `http.max_body_bytes`."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class RequestTimeoutError(ServerError):
    """The caller took too long to say what it wants."""

    status = 408
    type = "invalid_request_error"
    code = "request_timeout"


class AuthenticationError(ServerError):
    """No key, or a wrong one."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class PermissionDeniedError(ServerError):
    """A valid caller who may not do this."""

    status = 403
    type = "permission_error"


class UnsupportedMediaTypeError(ServerError):
    """A web page's body that does not say it is JSON."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class NotFoundError(ServerError):
    """No such model, job, artifact or route."""

    status = 404
    type = "invalid_request_error"


class ConflictError(ServerError):
    """The state of the server does not allow this now."""

    status = 409
    type = "conflict_error"


class QueueFullError(ServerError):
    """The waiting queue is full."""

    status = 429
    type = "rate_limit_error"
    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReadyError(ServerError):
    """Loading, calibrating, draining or failed."""

    status = 503
    type = "server_error"
    code = "not_ready"

    def __init__(self, message: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StorageError(ServerError):
    """The disk does not take what is to be kept: full, read-only, not allowed. The message has cause and path."""

    status = 507
    type = "server_error"
    code = "storage_failed"


class ConfigError(ServerError):
    """config.yaml, environment or command line is wrong; only raised at start."""


class ModelError(ServerError):
    """A model that is missing, unreachable or of an unsupported kind; only raised at start."""


class ServiceError(ServerError):
    """The daemon cannot be installed, removed or asked; only raised by `vecinfer service`."""


def internal_error(request_id: str) -> ServerError:
    """What callers hear of a bug: nothing but the id under which the log tells it."""
    return ServerError(f"internal error; the server's log has the details, under {request_id}", code="internal_error")
