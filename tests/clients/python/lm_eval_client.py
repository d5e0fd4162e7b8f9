"""PyPI lm-eval's API models, without a data set: scores of continuations, and generation."""

from harness import CAPITAL, DEMO, MODEL, check, run
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

ROUTES = {"completions": LocalCompletionsAPI, "chat/completions": LocalChatCompletion}


def model(route, **fields):
    return ROUTES[route](base_url=f"{DEMO}/v1/{route}", model=MODEL, max_retries=1, **fields)


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@check
def generate():
    texts = model("completions", tokenizer_backend=None).generate_until(
        requests("generate_until", ("The capital of France is", {"until": ["\n"], "max_gen_toks": 8}))
    )
    assert texts[0].strip()


@check
def chat_generate():
    lm = model("chat/completions", tokenizer_backend=None)
    chats = lm.apply_chat_template([{"role": "user", "content": CAPITAL}])
    texts = lm.generate_until(requests("generate_until", (chats, {"until": ["\n\n"], "max_gen_toks": 16})))
    assert texts[0].strip()


@check
def loglikelihood():
    lm = model("completions", tokenizer_backend="remote", tokenized_requests=True)
    pairs = [("The capital of France is", " Paris"), ("The capital of France is", " banana")]
    (right, _), (wrong, _) = lm.loglikelihood(requests("loglikelihood", *pairs))
    assert wrong < right < 0, (right, wrong)


run()
