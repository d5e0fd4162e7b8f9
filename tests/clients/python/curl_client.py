"""curl, as the documents show it."""

import json
import subprocess

from harness import CAPITAL, PLAIN, check, run


def curl(path, body=None, *options):
    words = ["curl", "-sS", "-w", "\n%{http_code}", *options, f"{PLAIN}{path}"]
    if body is not None:
        words += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=50, check=True)
    text, _, status = done.stdout.rpartition("\n")
    return int(status), text


MESSAGES = [{"role": "user", "content": CAPITAL}]


@check
def chat():
    status, text = curl("/v1/chat/completions", {"messages": MESSAGES})
    assert (status, "Paris" in text) == (200, True)


@check
def stream():
    status, text = curl("/v1/chat/completions", {"messages": MESSAGES, "stream": True}, "-N")
    assert status == 200
    assert text.rstrip().endswith("data: [DONE]")


@check
def responses():
    status, text = curl("/v1/responses", {"input": CAPITAL})
    assert (status, "Paris" in text) == (200, True)


@check
def messages():
    status, text = curl("/v1/messages", {"max_tokens": 50, "messages": MESSAGES}, "-H", "x-api-key: local")
    assert (status, "Paris" in text) == (200, True)


@check
def tokenize_and_back():
    status, text = curl("/tokenize", {"content": "Hello there"})
    assert status == 200, text
    status, text = curl("/detokenize", {"tokens": json.loads(text)["tokens"]})
    assert "Hello there" in text


@check
def root_and_slashes():
    assert curl("/")[0] == 200
    assert curl("/v1/models/")[0] == 200
    assert curl("/models")[0] == 200
    assert curl("/", None, "-I")[0] == 200


@check
def cors():
    origin = ("-H", "Origin: http://localhost:3000")
    status, text = curl("/v1/models", None, "-i", *origin)
    assert "access-control-allow-origin" in text.lower()
    ask = (*origin, "-X", "OPTIONS", "-H", "Access-Control-Request-Method: POST")
    status, _ = curl("/v1/chat/completions", None, *ask, "-H", "Access-Control-Request-Headers: content-type")
    assert status in (200, 204)


run()
