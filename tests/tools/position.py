"""Does it matter where a codec is fitted? `python -m tests.tools.position --fit-text FILE ... --text FILE ...`.

Fits the learned transform at 2 bits twice on the same tokens, the last quarter of long windows: where they stand, and
as windows of their own, near position 0. Prints the mean KL of both by position, in windows of the same length of each
`--text`, and the ratio in the last quarter. For a GPU; a CPU takes hours at the default length.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from quant_core.attention import patch
from quant_core.calibrate import collect
from quant_core.calibrate.evaluate import window_loss
from quant_core.calibrate.fit import fit_layer
from quant_core.calibrate.layers import packable_layers
from quant_core.calibrate.windows import text_windows
from quant_core.codec.codec import ModelCodec
from quant_core.codec.spec import VQSpec, WindowSpec
from quant_core.slices import run
from server.config import ServerConfig, user_data_dir
from server.model.device import prepare_device
from server.model.loader import load

Windows = list[list[int]]
BITS, SLICE_TOKENS = 2, 512


def _fit(model: Any, windows: Windows, skipped: int) -> ModelCodec:
    """Fitted on the tokens of each window from `skipped` on."""
    window = WindowSpec()
    with mock.patch.object(collect, "SKIPPED_TOKENS", skipped):
        samples = run(collect.collect(model, windows, packable_layers(model), window, 0, SLICE_TOKENS))
    layers = {}
    for index, of in samples.items():
        keys, values = (VQSpec.for_bits(dim, BITS) for dim in (of.geometry.key_dim, of.geometry.value_dim))
        layers[index] = run(fit_layer(of, keys, values, "learned", 0, index)).codec
    return ModelCodec("position", layers, window)


def _losses(model: Any, codec: ModelCodec, windows: Windows) -> list[float]:
    """Mean KL in the four quarters of the windows."""
    kl = [np.array(run(window_loss(model, codec, w, SLICE_TOKENS, None, 0)).losses.kl) for w in windows]
    return [float(np.mean([np.array_split(k, 4)[quarter].mean() for k in kl])) for quarter in range(4)]


def _long_windows(tokenizer: Any, path: Path, count: int, length: int) -> Windows:
    found = [w for w in text_windows(tokenizer, [path.read_text("utf-8")], count, length) if len(w) >= length]
    if not found:
        raise SystemExit(f"{path} holds no window of {length} tokens")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; write it to `--json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--fit-text", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--window-len", type=int, default=8000)
    parser.add_argument("--fit-windows", type=int, default=8, help="of each text")
    parser.add_argument("--windows", type=int, default=2, help="of each text")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    prepare_device(print)
    patch.install()
    loaded = load(options.model, user_data_dir(ServerConfig()), lambda line, fraction: None)
    length = options.window_len
    fitted = [
        w for path in options.fit_text for w in _long_windows(loaded.tokenizer, path, options.fit_windows, length)
    ]
    scored = {p.stem: _long_windows(loaded.tokenizer, p, options.windows, length) for p in options.text}
    first = length * 3 // 4
    skipped = collect.SKIPPED_TOKENS
    report: dict[str, dict[str, list[float]]] = {}
    for name, windows, skip in (("near", [w[first - skipped :] for w in fitted], skipped), ("there", fitted, first)):
        codec = _fit(loaded.model, windows, skip)
        report[name] = {text: _losses(loaded.model, codec, w) for text, w in scored.items()}
        for text, losses in report[name].items():
            print(f"fitted {name:5s} {text:12s}", *(f"{x:.4f}" for x in losses), flush=True)
    for text in scored:
        print(f"{text:12s} last quarter, near / there: {report['near'][text][3] / report['there'][text][3]:.3f}")
    if options.json:
        options.json.write_text(json.dumps(report), "utf-8")


if __name__ == "__main__":
    main()
