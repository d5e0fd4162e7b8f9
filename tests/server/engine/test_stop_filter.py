"""Stop strings never leak, however the text is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engine.answer_text import StopFilter

TEXT = st.text("abc", max_size=12)


def naive(text: str, stops: list[str]) -> str:
    """Up to the stop string that is completed first."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    return text[: min(ends)[1]] if ends else text


@given(pieces=st.lists(TEXT, max_size=8), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_equals_a_search_in_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    stop = StopFilter(stops)
    out = "".join(stop.push(p) for p in pieces) + stop.flush()
    assert out == naive("".join(pieces), stops)
    assert (stop.num_held, stop.num_cut) == (0, len("".join(pieces)) - len(out))
    assert (stop.met is not None) == any(s in "".join(pieces) for s in stops)


def test_text_is_held_only_while_it_could_become_a_stop_string() -> None:
    stop = StopFilter(["END"])
    assert [stop.push(p) for p in ("ab", "E", "N", "x", "EN", "D", "after")] == ["ab", "", "", "ENx", "", "", ""]
    assert (stop.met is not None) and stop.flush() == ""
