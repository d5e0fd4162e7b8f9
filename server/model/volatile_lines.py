"""What changes with each request in the head of an agent's prompt: dropped where it is no instruction, or named."""

from __future__ import annotations

import re

# Claude Code's first system block: which client asks, and a nonce. Anthropic's own server takes it out of the prompt.
_BILLING_HEADER = re.compile(r"\s*x-anthropic-billing-header:[^\n]*(?:\n|\Z)\s*", re.IGNORECASE)
# Kinds of changing text, the surest first; looked for around the place where two prompts part.
_KINDS = {
    "billing header": re.compile(r"x-anthropic-billing-header|cc_version=|\bcch=", re.IGNORECASE),
    "date or time": re.compile(
        r"\b\d{4}-\d{2}-\d{2}\b|\b\d{1,2}:\d{2}(:\d{2})?\b|\b\d{1,2}[./]\d{1,2}[./]\d{2,4}\b|\b(today|date|time)\b|"
        r"\b(mon|tues|wednes|thurs|fri|satur|sun)day\b|\b(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.? \d",
        re.IGNORECASE,
    ),
    "token counter": re.compile(r"\btokens?\b[^\n]{0,40}\d|\d[^\n]{0,40}\btokens?\b|\bremaining\b", re.IGNORECASE),
    "random id": re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}|\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{8,}\b", re.IGNORECASE),
}


def without_billing_header(system: str) -> str:
    """A system text of /v1/messages without Claude Code's billing header, if it begins with one."""
    return _BILLING_HEADER.sub("", system, count=1) if _BILLING_HEADER.match(system) else system


def kind_of_change(before: str, here: str, there: str) -> str | None:
    """What seems to have changed where two prompts part: the line around it in each; None: nothing known."""
    start = before.rpartition("\n")[2]
    lines = [start + after.partition("\n")[0] for after in (here, there)]
    return next((kind for kind, pattern in _KINDS.items() if all(map(pattern.search, lines))), None)
