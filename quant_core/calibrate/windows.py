"""Calibration text as windows of tokens: given text, or the model's own continuations of built-in prompts."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from importlib.resources import files
from itertools import chain, islice
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from quant_core.errors import CodecError
from quant_core.slices import Clock, Progress, mapped, run

# A window shorter than this reads no coded page at the default settings and is not worth keeping.
MIN_WINDOW_LEN = 160
# Tokens of one prompt and its continuation; several fill a window. Short ones batch wide, which decodes faster.
DOCUMENT_LEN = 128
TEMPERATURE = 0.8
PIECE_CHARS = 2000
# Prompt tokens of all rows read in one slice, and decode steps between two looks at the clock.
CPU_PREFILL_TOKENS, GPU_PREFILL_TOKENS = 64, 1024
CPU_STEPS, GPU_STEPS = 1, 8
# Documents written side by side: where a step's time grows with them, and where it hardly does.
CPU_ROWS, MAX_GPU_ROWS = 32, 256
# Of a GPU's memory, what their caches may take.
GPU_CACHE_SHARE = 1 / 64
# Pieces tokenised in one slice: some 10 ms.
PIECES_PER_SLICE = 8
# Characters taken for one token of a window where there are far more; no text of one's own has so long tokens.
STRETCH_CHARS_PER_TOKEN = 16


def text_windows(tokenizer: Any, texts: Sequence[str], num_samples: int, sample_len: int) -> list[list[int]]:
    """`text_window_slices` in one go."""
    return run(text_window_slices(tokenizer, texts, num_samples, sample_len))


def text_window_slices(
    tokenizer: Any, texts: Sequence[str], num_samples: int, sample_len: int
) -> Generator[Progress, None, list[list[int]]]:
    """At most `num_samples` windows of `sample_len` tokens, spread evenly over all texts; yields every few pieces.

    Long texts are cut; short ones (chat messages, lines) follow one another in a window.

    Raises:
        CodecError: the texts hold fewer tokens than one short window.
    """
    prefix = _special_prefix(tokenizer)
    body = sample_len - len(prefix)
    windows: list[list[int]] = []
    rest: list[int] = []
    clock, total, done, num_pieces = Clock("text"), max(1, sum(map(len, texts))), 0, 0
    for text in texts:
        tokens: list[int] = []
        for piece in _pieces(text):
            tokens += tokenizer.encode(piece, add_special_tokens=False)
            done, num_pieces = done + len(piece), num_pieces + 1
            if num_pieces % PIECES_PER_SLICE == 0:
                yield clock.at(done / total, "reading the calibration text")
        cut = len(tokens) - len(tokens) % body
        windows += [tokens[i : i + body] for i in range(0, cut, body)]
        rest += tokens[cut:]
    windows += [rest[i : i + body] for i in range(0, len(rest), body)]
    long_enough = [w for w in windows if len(w) >= min(body, MIN_WINDOW_LEN)]
    if not long_enough:
        raise CodecError(
            f"the calibration text holds {sum(map(len, windows))} tokens and a window needs "
            f"{min(body, MIN_WINDOW_LEN)}; give more text, or use the built-in text"
        )
    step = max(1.0, len(long_enough) / num_samples)
    picked = [long_enough[int(i * step)] for i in range(min(num_samples, len(long_enough)))]
    return [prefix + w for w in picked]


def thinned(texts: Sequence[str], num_samples: int, sample_len: int) -> list[str]:
    """The texts, or where they are far longer than what the windows take, as many stretches spread evenly over them.

    So megabytes are neither tokenised nor kept for the few thousand tokens that a calibration reads.
    """
    stretch, total = STRETCH_CHARS_PER_TOKEN * sample_len, sum(map(len, texts))
    if total <= 2 * num_samples * stretch:
        return list(texts)
    whole = "\n".join(texts) if len(texts) > 1 else texts[0]
    starts = (i * total // num_samples for i in range(num_samples))
    return [whole[start : start + stretch] for start in starts]


def _pieces(text: str) -> list[str]:
    """The text cut at line ends into pieces of about PIECE_CHARS, which tokenizers take without complaint."""
    pieces: list[list[str]] = [[]]
    size = 0
    for line in text.splitlines(keepends=True):
        for part in (line[i : i + PIECE_CHARS] for i in range(0, len(line), PIECE_CHARS)):
            if size + len(part) > PIECE_CHARS:
                pieces.append([])
                size = 0
            pieces[-1].append(part)
            size += len(part)
    return ["".join(p) for p in pieces if p]


def builtin_prompts() -> list[str]:
    """The project's own prompts: prose, code, dialogue, mathematics, many languages."""
    text = (files("quant_core.calibrate") / "prompts.txt").read_text(encoding="utf-8")
    return [p.strip() for p in text.split("\n%%\n")]


def builtin_windows(
    model: Any, tokenizer: Any, num_samples: int, sample_len: int, seed: int
) -> Generator[Progress, None, list[list[int]]]:
    """`num_samples` windows of the built-in prompts, each continued by the model; yields after each decode step.

    All rows of a batch have the same length at every step: a row whose prompt is not over takes its next token
    instead of the sampled one, so no architecture needs padding.
    """
    per_window = max(1, round(sample_len / DOCUMENT_LEN))
    document_len = -(-sample_len // per_window)
    prompts = _encoded_prompts(tokenizer, num_samples * per_window, document_len, seed)
    documents = yield from continued(model, prompts, document_len, seed)
    # Prompts that follow one another are of different kinds; so are the documents of a window.
    return [
        list(chain(*(documents[i] for i in range(w, len(prompts), num_samples))))[:sample_len]
        for w in range(num_samples)
    ]


def continued(
    model: Any, prompts: Sequence[list[int]], document_len: int, seed: int
) -> Generator[Progress, None, list[list[int]]]:
    """Each prompt continued by the model to `document_len` tokens."""
    # Prompts of like length go together: what all of a batch share is read at once instead of step by step.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    num_rows = rows_at_once(model, document_len)
    batches = [order[i : i + num_rows] for i in range(0, len(order), num_rows)]
    clock, documents = Clock("text"), dict[int, list[int]]()
    for number, batch in enumerate(batches):
        key = mx.random.key(seed * 1000 + number)
        writing = _continue(model, [prompts[i] for i in batch], document_len, key)
        rows = yield from mapped(writing, _progress_of_batch(clock, number, len(batches)))
        documents.update(zip(batch, rows, strict=True))
    return [documents[i] for i in range(len(prompts))]


def rows_at_once(model: Any, document_len: int) -> int:
    """Documents that are written side by side; a power of two on a GPU, so that alike machines write alike."""
    if _on_cpu():
        return CPU_ROWS
    caches = make_prompt_cache(model)
    mx.eval(model(mx.array([[0] * document_len]), cache=caches))
    row_bytes = max(1, sum(int(c.nbytes) for c in caches if not c.empty()))
    facts = mx.device_info()
    memory = int(facts.get("max_recommended_working_set_size", 0) or facts.get("total_memory", 0))
    fitting = int(memory * GPU_CACHE_SHARE) // row_bytes
    return min(MAX_GPU_ROWS, max(CPU_ROWS, 1 << max(0, fitting.bit_length() - 1)))


def _on_cpu() -> bool:
    return bool(mx.default_device() == mx.Device(mx.cpu))


def _progress_of_batch(clock: Clock, number: int, num_batches: int) -> Callable[[float], Progress]:
    return lambda part: clock.at((number + part) / num_batches, f"writing calibration text, part {number + 1}")


def _encoded_prompts(tokenizer: Any, count: int, document_len: int, seed: int) -> list[list[int]]:
    """`count` prompts as tokens, shuffled, in turn as plain text and as a chat message, cut to 3/4 of a document."""
    texts = builtin_prompts()
    order = np.random.default_rng(seed).permutation(len(texts))
    chat = getattr(tokenizer, "chat_template", None) is not None
    prefix = _special_prefix(tokenizer)
    prompts = []
    for i in range(count):
        text = texts[order[i % len(texts)]]
        # The second time round each prompt comes in the other form.
        if chat and (i + i // len(texts)) % 2:
            messages = [{"role": "user", "content": text}]
            tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        else:
            tokens = prefix + tokenizer.encode(text, add_special_tokens=False)
        prompts.append([int(t) for t in islice(tokens, max(1, document_len * 3 // 4))])
    return prompts


def _continue(
    model: Any, prompts: list[list[int]], length: int, key: mx.array
) -> Generator[float, None, list[list[int]]]:
    """Rows of `length` tokens that begin with the prompts; yields the part done after each decode step, or several."""
    shortest = min(len(p) for p in prompts)
    forced = np.full((len(prompts), length), -1, np.int32)
    for row, prompt in zip(forced, prompts, strict=True):
        row[: len(prompt)] = prompt
    caches = make_prompt_cache(model)
    columns: list[mx.array] = []
    step = max(1, (CPU_PREFILL_TOKENS if _on_cpu() else GPU_PREFILL_TOKENS) // len(prompts))
    steps = CPU_STEPS if _on_cpu() else GPU_STEPS
    for start in range(0, shortest - 1, step):
        model(mx.array(forced[:, start : min(start + step, shortest - 1)]), cache=caches)
        mx.eval([c.state for c in caches])  # and not the logits
        yield start / length
    tokens = mx.array(forced[:, shortest - 1 : shortest])
    for position in range(shortest, length):
        key, draw = mx.random.split(key)
        logits = model(tokens, cache=caches)[:, -1].astype(mx.float32)
        sampled = mx.random.categorical(logits / TEMPERATURE, key=draw).astype(mx.int32)
        wanted = mx.array(forced[:, position])
        tokens = mx.where(wanted >= 0, wanted, sampled)[:, None]
        columns.append(tokens)
        # The host builds the next step while this one runs; it waits once a slice.
        mx.async_eval(tokens, [c.state for c in caches])  # type: ignore[no-untyped-call]
        if (position + 1 - shortest) % steps == 0:
            mx.eval(tokens)
            yield (position + 1) / length
    written = [forced[:, :shortest], *(np.array(column) for column in columns)]
    return [[int(t) for t in row] for row in np.concatenate(written, axis=1)]


def _special_prefix(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before any text, such as a begin-of-sequence token."""
    return list(tokenizer.encode(""))[:4]
