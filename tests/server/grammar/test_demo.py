"""Random schemas on the demo model, eight answers at a time through the engine."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from mlx_lm import load

from server.engine.loop import EngineLoop
from server.engine.request import GenerationRequest, SamplingParams, TokenEvent
from server.errors import BadRequestError
from server.grammar.spec import json_schema
from server.model.loader import for_cpu
from tests.helpers.random_schemas import Schema, random_schema
from tests.server.engine.harness import read, serving

NUM_ROWS = 8
MAX_TOKENS = 90
pytestmark = [pytest.mark.demo, pytest.mark.full]


@pytest.fixture(scope="module")
def demo(demo_model_dir: Path) -> tuple[Any, Any]:
    model, tokenizer = load(str(demo_model_dir))[:2]
    return for_cpu(model), tokenizer


def held_schemas(loop: EngineLoop, seeds: range) -> list[tuple[int, Schema]]:
    """Schemas that are not refused."""
    held = []
    for seed in seeds:
        schema = random_schema(random.Random(seed))
        try:
            loop.grammars.compile(json_schema(schema))
        except BadRequestError:
            continue
        held.append((seed, schema))
    return held


def answers(loop: EngineLoop, tokenizer: Any, schemas: list[tuple[int, Schema]]) -> list[tuple[str, str]]:
    """Each answer's finish reason and text."""
    streams = []
    for seed, schema in schemas:
        messages = [
            {"role": "user", "content": f"Give a short JSON example of this schema: {json.dumps(schema)[:120]}"}
        ]
        prompt = tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        sampling = SamplingParams(temperature=0.7, seed=seed)
        streams.append(
            loop.stream(GenerationRequest(f"s{seed}", prompt, sampling, MAX_TOKENS, grammar=json_schema(schema)))
        )
    told = [read(iter(stream)) for stream in streams]
    return [(answer.finish.reason, "".join(e.text for e in answer.of(TokenEvent))) for answer in told]


def check(demo: tuple[Any, Any], seeds: range) -> None:
    with serving(*demo, max_num_seqs=NUM_ROWS, prefill_tokens_per_step=128) as loop:
        held = held_schemas(loop, seeds)
        ended = 0
        for at in range(0, len(held), NUM_ROWS):
            part = held[at : at + NUM_ROWS]
            for (_, schema), (reason, text) in zip(part, answers(loop, demo[1], part), strict=True):
                if reason == "stop":
                    ended += 1
                    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        assert ended > 0.5 * len(held)


def test_answers_of_random_schemas_validate(demo: tuple[Any, Any]) -> None:
    check(demo, range(6))


@pytest.mark.slow
def test_five_hundred_random_schemas(demo: tuple[Any, Any]) -> None:
    check(demo, range(500))
