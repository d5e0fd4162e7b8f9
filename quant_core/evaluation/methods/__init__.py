"""The methods by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quant_core.backends.base import KernelBackend
from quant_core.codec.spec import LEGAL_BITS
from quant_core.errors import SpecError
from quant_core.evaluation.methods.affine import Affine
from quant_core.evaluation.methods.base import Method
from quant_core.evaluation.methods.float16 import Float16
from quant_core.evaluation.methods.packed import RECIPES, PackedMethod

_FIXED: dict[str, Callable[[], Method]] = {
    "float16": Float16,
    "affine8": lambda: Affine(8),
    "affine4": lambda: Affine(4),
}
METHODS = (*_FIXED, *RECIPES)


def make_methods(
    names: Sequence[str],
    bits: Sequence[tuple[int, int]],
    backend: KernelBackend | None = None,
    windows: Sequence[int | None] = (None,),
) -> list[Method]:
    """The named methods, those that are fitted once per pair of `(key bits, value bits)` and exact window.

    A fitted method's name may carry its own bits, its own window, or both: `auto:2`, `auto:4/2`, `auto:2@128`.

    Raises:
        SpecError: an unknown name, or bits outside 1-4.
    """
    fixed, fitted = list[Method](), list[Method]()
    for name in names:
        base = base_name(name)
        if base not in METHODS or (base in _FIXED and base != name):
            raise SpecError(f"unknown method {name}; allowed: {', '.join(METHODS)}, fitted ones also as auto:4/2@128")
        if base in _FIXED:
            fixed.append(_FIXED[base]())
            continue
        own_bits, _, own_window = name.removeprefix(base).removeprefix(":").partition("@")
        pairs = [parse_bits(own_bits)] if own_bits else list(bits)
        widths = [_whole_number(own_window, name)] if own_window else list(windows)
        if wrong := [b for pair in pairs for b in pair if b not in LEGAL_BITS]:
            raise SpecError(f"bits must be in {LEGAL_BITS}, got {wrong}")
        fitted += [PackedMethod(base, k, v, w, backend) for k, v in pairs for w in widths]
    return fixed + fitted


def base_name(name: str) -> str:
    """The method without its bits and window: `auto` of `auto:4/2@128`."""
    return name.partition("@")[0].partition(":")[0]


def parse_bits(text: str) -> tuple[int, int]:
    """Bits of keys and of values from `2` or `4/2`.

    Raises:
        SpecError: it is neither.
    """
    keys, _, values = text.strip().partition("/")
    return _whole_number(keys, text), _whole_number(values or keys, text)


def _whole_number(text: str, whole: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise SpecError(f"bits are 2, or keys/values as in 4/2, a window follows @; got {whole!r}") from error
