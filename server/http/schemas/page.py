"""POST /page/login: the request."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from server.errors import BadRequestError
from server.http.schemas.base import RequestBody


class LoginBody(RequestBody):
    """The admin key, or the secret of a one-time link."""

    closed: ClassVar[bool] = True

    key: str | None = Field(None, max_length=4096)
    link: str | None = Field(None, max_length=4096)

    def check(self) -> None:
        """Exactly one of them.

        Raises:
            BadRequestError: none or both.
        """
        if (self.key is None) == (self.link is None):
            raise BadRequestError("give 'key' or 'link'")
