"""PyPI dspy: its chat and JSON adapters."""

import dspy
from harness import CAPITAL, KEY, MODEL, PLAIN, check, run

lm = dspy.LM(f"openai/{MODEL}", api_base=f"{PLAIN}/v1", api_key=KEY, cache=False, num_retries=0)
dspy.configure(lm=lm)


@check
def bare():
    assert "Paris" in str(lm(CAPITAL)[0])


@check
def predict():
    assert dspy.Predict("question -> answer")(question=CAPITAL).answer == "Paris"


@check
def json_adapter():
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        assert dspy.Predict("question -> answer")(question=CAPITAL).answer


run()
