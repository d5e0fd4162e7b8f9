"""Would a codec on latent attention's cached vector pay? `python -m tests.tools.latent`, seconds on a CPU.

Random weights in the shape of GLM-4.7-Flash (latent 512, rotary part 64, 20 heads): each token's latent vector serves
all heads as keys and as values, so whatever a code loses, all heads lose at once. Beside it the same codes on the keys
and values of eight ordinary heads of 128. The error is that of the attention's output, relative to its norm.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

NUM_TOKENS, NUM_QUERIES, NUM_HEADS = 1024, 32, 20
LATENT, ROTARY, NOPE = 512, 64, 192
KV_HEADS, HEAD_DIM = 8, 128
# Standard deviation of the scores: attention that chooses among some tokens, as trained models do.
SHARPNESS = 3.0
Code = Callable[[mx.array], mx.array]


def affine(bits: int) -> Code:
    """mlx-lm's own: a scale and a bias for 64 channels."""
    return lambda x: mx.dequantize(*mx.quantize(x, 64, bits), 64, bits)


def table(x: mx.array) -> Code:
    """Two bits: 256 centroids for four channels, by k-means on half of the vectors."""
    fitted = x.reshape(-1, 4)[: x.size // 8]
    centroids = fitted[:256]
    for _ in range(12):
        one_hot = (_nearest(fitted, centroids)[:, None] == mx.arange(256)[None]).astype(mx.float32)
        centroids = (one_hot.T @ fitted) / mx.maximum(one_hot.sum(0), 1)[:, None]
        mx.eval(centroids)
    return lambda y: centroids[_nearest(y.reshape(-1, 4), centroids)].reshape(y.shape)


def _nearest(x: mx.array, centroids: mx.array) -> mx.array:
    return ((centroids**2).sum(1)[None] - 2 * x @ centroids.T).argmin(1)


def attend(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """softmax(q k) v per head: `[H, Q, D]`, `[H or 1, T, D]`, `[H or 1, T, Dv]`."""
    return mx.softmax(queries @ keys.swapaxes(-1, -2), axis=-1) @ values


def apart(a: mx.array, b: mx.array) -> float:
    """Relative error of b."""
    return float(mx.linalg.norm((a - b).reshape(-1)) / mx.linalg.norm(a.reshape(-1)))


def latent_error(code: Callable[[mx.array], Code]) -> float:
    """With the rotary part exact and the latent vector coded."""
    mx.random.seed(0)
    latents = mx.random.normal((1, NUM_TOKENS, LATENT))
    rotary = mx.random.normal((1, NUM_TOKENS, ROTARY))
    up = mx.random.normal((NUM_HEADS, LATENT, NOPE)) / LATENT**0.5
    queries = mx.random.normal((NUM_HEADS, NUM_QUERIES, NOPE + ROTARY)) * SHARPNESS / (NOPE + ROTARY) ** 0.5
    down = mx.random.normal((NUM_HEADS, LATENT, HEAD_DIM)) / LATENT**0.5
    absorbed = mx.concatenate([queries[..., :NOPE] @ up.swapaxes(-1, -2), queries[..., NOPE:]], -1)
    exact = attend(absorbed, mx.concatenate([latents, rotary], -1), latents) @ down
    coded = code(latents)(latents)
    return apart(exact, attend(absorbed, mx.concatenate([coded, rotary], -1), coded) @ down)


def heads_error(code: Callable[[mx.array], Code]) -> float:
    """With keys and values of ordinary heads coded."""
    mx.random.seed(0)
    keys, values = (mx.random.normal((KV_HEADS, NUM_TOKENS, HEAD_DIM)) for _ in range(2))
    queries = mx.random.normal((KV_HEADS, NUM_QUERIES, HEAD_DIM)) * SHARPNESS / HEAD_DIM**0.5
    return apart(attend(queries, keys, values), attend(queries, code(keys)(keys), code(values)(values)))


def main() -> None:
    """Print bytes a token and errors."""
    print(f"{'code':10} {'latent: bytes':>14} {'error':>6}   {'8 heads: bytes':>14} {'error':>6}")
    rows: list[tuple[str, float, Callable[[mx.array], Code]]] = [
        ("affine 8", 8.5, lambda x: affine(8)),
        ("affine 4", 4.5, lambda x: affine(4)),
        ("table 2", 2.0, table),
    ]
    print(f"{'float16':10} {2 * (LATENT + ROTARY):14,} {'-':>6}   {4 * KV_HEADS * HEAD_DIM:14,} {'-':>6}")
    for name, bits, code in rows:
        latent_bytes, head_bytes = LATENT * bits / 8 + 2 * ROTARY, 2 * KV_HEADS * HEAD_DIM * bits / 8
        print(
            f"{name:10} {latent_bytes:14,.0f} {latent_error(code):6.3f}   {head_bytes:14,.0f} {heads_error(code):6.3f}"
        )


if __name__ == "__main__":
    main()
