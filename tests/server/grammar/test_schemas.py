"""Random JSON schemas: every text that ends by itself validates, and what cannot be held is refused."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest

from server.errors import BadRequestError
from server.grammar.compile import GrammarCompiler
from server.grammar.constraint import make_constraint
from server.grammar.spec import json_schema
from tests.helpers.random_schemas import random_schema
from tests.server.grammar.walk import random_text


def walk(compiler: GrammarCompiler, schema: Any, seed: int, max_tokens: int) -> str:
    """ "refused", "cut", or "valid" after the check."""
    try:
        constraint = make_constraint(compiler, json_schema(schema))
    except BadRequestError:
        return "refused"
    text, ended = random_text(constraint, compiler, np.random.default_rng(seed), max_tokens)
    if not ended:
        return "cut"
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    return "valid"


def check(compiler: GrammarCompiler, seeds: range) -> None:
    found = [walk(compiler, random_schema(random.Random(seed)), seed, 600) for seed in seeds]
    # A check that refuses or cuts everything would show nothing.
    assert found.count("valid") > 0.7 * len(found), {k: found.count(k) for k in set(found)}


@pytest.mark.parametrize("part", range(4))
def test_random_documents_of_random_schemas_validate(compiler: GrammarCompiler, part: int) -> None:
    check(compiler, range(part * 125, part * 125 + 125))


@pytest.mark.slow
def test_many_more_random_schemas(compiler: GrammarCompiler) -> None:
    check(compiler, range(1000, 6000))
