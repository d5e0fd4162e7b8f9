"""Python clients, unmodified and at pinned versions, against the server over a real socket."""

from __future__ import annotations

import pytest

from tests.clients.catalogue import Client, cases
from tests.clients.conftest import Results


@pytest.mark.demo
@pytest.mark.parametrize(("client", "check"), cases("python"))
def test_the_client_does(results: Results, client: Client, check: str) -> None:
    result = results.of(client, check)
    assert result.error is None, f"{client.id} {check}: {result.error}"
