"""SIGTERM while answers are written: each ends in its API's own form, newcomers hear why, the log stays quiet."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.faults.process import server_process

LONG: dict[str, Any] = {"model": "tiny", "ignore_eos": True, "temperature": 0}
TALK = [{"role": "user", "content": "Tell me a story."}]
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": LONG | {"messages": TALK, "max_tokens": 3900},
    "/v1/completions": LONG | {"prompt": "Once", "max_tokens": 3900},
    "/v1/responses": LONG | {"input": "Tell me a story.", "max_output_tokens": 3900},
    "/v1/messages": LONG | {"messages": TALK, "max_tokens": 3900},
}


class Talk(threading.Thread):
    """A request in a thread, and all that came of it."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.url, self.body, self.began = url, body, threading.Event()
        self.status, self.text, self.error = 0, "", ""
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", self.url, json=self.body, timeout=60) as answer:
                self.status = answer.status_code
                for piece in answer.iter_text():
                    self.text += piece
                    self.began.set()
        except httpx.HTTPError as error:
            self.error = repr(error)

    def events(self) -> Iterator[Any]:
        """The stream's JSON."""
        for line in self.text.splitlines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


def test_every_answer_ends_in_its_apis_form(tmp_path: Path) -> None:
    settings = {"engine": {"drain_timeout_s": 1.0}}
    with server_process(tmp_path, settings) as server:
        streams = {path: Talk(server.url + path, body | {"stream": True}) for path, body in REQUESTS.items()}
        plain = {path: Talk(server.url + path, body) for path, body in REQUESTS.items()}
        assert all(talk.began.wait(30) for talk in streams.values())
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        late = httpx.post(server.url + "/v1/chat/completions", json={"messages": TALK}, timeout=10)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "not_ready")
        assert int(late.headers["retry-after"]) >= 1
        for talk in (*streams.values(), *plain.values()):
            talk.join(30)
            assert talk.error == ""
        assert server.process.wait(20) in (0, -signal.SIGTERM)
    last = {path: list(talk.events())[-1] for path, talk in streams.items()}
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert last[path]["error"]["code"] == "not_ready"
    assert last["/v1/responses"]["type"] == "response.failed"
    assert (last["/v1/messages"]["type"], last["/v1/messages"]["error"]["type"]) == ("error", "overloaded_error")
    for talk in plain.values():
        assert talk.status == 503 and "shutting down" in json.dumps(json.loads(talk.text)["error"])
    assert "Traceback" not in server.log


def test_an_answer_that_ends_in_time_is_whole(tmp_path: Path) -> None:
    with server_process(tmp_path, {"engine": {"drain_timeout_s": 20.0}}) as server:
        body = REQUESTS["/v1/chat/completions"] | {"max_tokens": 1500, "stream": True}
        talk = Talk(server.url + "/v1/chat/completions", body)
        assert talk.began.wait(30)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) in (0, -signal.SIGTERM)
        talk.join(10)
    assert talk.error == "" and talk.text.rstrip().endswith("data: [DONE]")
    (*_, last) = talk.events()
    assert last["choices"][0]["finish_reason"] == "length"
