"""A stand-in for `mx.fast.metal_kernel`: MLX generates the text, this package checks and runs it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from tests.msl_on_cpu.compiler import compile_kernel, typecheck
from tests.msl_on_cpu.execution import Argument, Array, LoadedKernel, Result
from tests.msl_on_cpu.lint import lint
from tests.msl_on_cpu.text import KernelFault

_REAL_METAL_KERNEL = mx.fast.metal_kernel


@dataclass(frozen=True)
class Options:
    """How launches are checked. `runs`: thread order and seed of each run; all must give the same bytes."""

    runs: tuple[tuple[str, int], ...] = (("random", 0),)
    fp: str = "precise"
    defines: tuple[str, ...] = ()
    strict_simd: bool = True
    static_checks: bool = True


@dataclass(eq=False)
class _State:
    options: Options = field(default_factory=Options)
    loaded: dict[Any, LoadedKernel] = field(default_factory=dict)
    last: dict[str, list[Result]] = field(default_factory=dict)


_STATE = _State()


@contextmanager
def options(**changes: Any) -> Iterator[Options]:
    """Change the options of launches inside the block."""
    before = _STATE.options
    _STATE.options = replace(before, **changes)
    try:
        yield _STATE.options
    finally:
        _STATE.options = before


@contextmanager
def installed() -> Iterator[None]:
    """Inside the block `mx.fast.metal_kernel` is this module's: the program's Metal path runs on the CPU, checked."""
    mx.fast.metal_kernel = metal_kernel
    try:
        yield
    finally:
        mx.fast.metal_kernel = _REAL_METAL_KERNEL


def last_results(name: str) -> list[Result]:
    """Results of the last launch of kernel `name`, one per run."""
    return _STATE.last[name]


def capture(call: Callable[..., Any], inputs: Sequence[mx.array]) -> dict[str, Any]:
    """The CustomKernel node MLX records for `call(*inputs)`: generated source, grid, flags."""
    nodes: list[dict[str, Any]] = []

    def on_node(node: dict[str, Any]) -> None:
        if node.get("type") == "primitive" and node["name"] == "CustomKernel":
            nodes.append(node)

    mx.export_function(on_node, call, *inputs)
    if len(nodes) != 1:
        raise KernelFault(f"expected one kernel launch, MLX recorded {len(nodes)}")
    return nodes[0]


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: Any = None,
) -> Callable[..., list[mx.array]]:
    """Same signature and result as `mx.fast.metal_kernel`; a launch raises KernelFault for anything undefined."""
    extra = {} if compile_options is None else {"compile_options": compile_options}
    real: Any = _REAL_METAL_KERNEL(
        name=name,
        input_names=input_names,
        output_names=output_names,
        source=source,
        header=header,
        ensure_row_contiguous=ensure_row_contiguous,
        atomic_outputs=atomic_outputs,
        **extra,
    )

    def call(
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Any],
        output_dtypes: Sequence[Any],
        grid: Any,
        threadgroup: Any,
        template: Any = None,
        init_value: float | None = None,
        stream: Any = None,
    ) -> list[mx.array]:
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        _check_launch(name, arrays, grid, threadgroup)
        node = capture(
            lambda *ins: real(
                inputs=list(ins),
                output_shapes=output_shapes,
                output_dtypes=output_dtypes,
                grid=grid,
                threadgroup=threadgroup,
                template=template or [],
                init_value=init_value,
                stream=mx.gpu,
            ),
            arrays,
        )
        kernel = _load(node, source, header)
        arguments = _inputs(input_names, arrays, node["arguments"][8])
        arguments += _outputs(output_names, output_shapes, output_dtypes, init_value)
        outputs = _run(name, kernel, arguments, tuple(grid), tuple(threadgroup))
        return [
            mx.array(o).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(o)
            for o, dtype in zip(outputs, output_dtypes, strict=True)
        ]

    return call


def _check_launch(name: str, arrays: Sequence[mx.array], grid: Any, threadgroup: Any) -> None:
    if any(not x.ndim for x in arrays):
        raise KernelFault(f"{name}: 0-d inputs are references on Metal and pointers on CUDA")
    if any(g % t for g, t in zip(grid, threadgroup, strict=True)):
        raise KernelFault(f"{name}: grid {grid} is no multiple of threadgroup {threadgroup}")


def _load(node: dict[str, Any], source: str, header: str) -> LoadedKernel:
    function, text = node["arguments"][0], node["arguments"][1]
    now = _STATE.options
    key = (text, now.fp, now.defines)
    if key not in _STATE.loaded:
        match = re.search(r"decltype\((\w+)(<.*>)\)\s+\w+<", text)
        template = match.group(2) if match else ""
        if now.static_checks:
            findings = [*lint(header), *lint("{" + source + "}"), *typecheck(text, function, template)]
            if findings:
                raise KernelFault("\n".join(findings))
        _STATE.loaded[key] = LoadedKernel(compile_kernel(text, function, template, now.fp, now.defines))
    return _STATE.loaded[key]


def _inputs(names: Sequence[str], arrays: Sequence[mx.array], infos: Sequence[Any]) -> list[Argument]:
    arguments = []
    for name, array, info in zip(names, arrays, infos, strict=True):
        contents = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        arguments.append(Argument(name, np.array(mx.contiguous(contents))))
        has_shape, has_strides, has_ndim = info[0], info[1], info[2]
        if has_shape:
            arguments.append(Argument(f"{name}_shape", np.array(array.shape, np.int32)))
        if has_strides:
            strides = [int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)]
            arguments.append(Argument(f"{name}_strides", np.array(strides, np.int64)))
        if has_ndim:
            arguments.append(Argument(f"{name}_ndim", np.array([array.ndim], np.int32)))
    return arguments


def _outputs(
    names: Sequence[str], shapes: Sequence[Any], dtypes: Sequence[Any], init_value: float | None
) -> list[Argument]:
    arguments = []
    for name, shape, dtype in zip(names, shapes, dtypes, strict=True):
        np_dtype = np.dtype(np.uint16) if dtype == mx.bfloat16 else np.array(mx.zeros((1,), dtype)).dtype
        contents = np.full(shape, 0 if init_value is None else init_value, np_dtype)
        arguments.append(Argument(name, contents, is_output=True, is_defined=init_value is not None))
    return arguments


def _run(
    name: str, kernel: LoadedKernel, arguments: list[Argument], grid: tuple[int, int, int], group: tuple[int, int, int]
) -> list[Array]:
    results: list[Result] = []
    _STATE.last[name] = results
    for order, seed in _STATE.options.runs:
        result = kernel.run(
            arguments,
            grid,
            group,
            order=order,
            seed=seed,
            strict_simd=_STATE.options.strict_simd,
        )
        results.append(result)
        if result.reports:
            raise KernelFault(f"{name}:\n{result.reports}")
        for first, now in zip(results[0].outputs, result.outputs, strict=True):
            if not np.array_equal(first.view(np.uint8), now.view(np.uint8)):
                raise KernelFault(f"{name}: the result depends on the thread order ({order}, seed {seed})")
    return results[0].outputs
