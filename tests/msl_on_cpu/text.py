"""Kernel text: comments, threadgroup variables, signatures, and the C++ translation unit made of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

PRELUDE = '#include <metal_stdlib>\nusing namespace metal;\n#include "mlx/backend/metal/kernels/utils.h"\n'

# Metal attribute -> field of the runtime's msl_attrs, as a vector and as a scalar.
VECTOR_ATTRIBUTES = {
    "thread_position_in_grid": "gid",
    "thread_position_in_threadgroup": "tid",
    "threadgroup_position_in_grid": "tgp",
    "threads_per_threadgroup": "tpt",
    "dispatch_threads_per_threadgroup": "tpt",
    "threadgroups_per_grid": "tpg",
    "threads_per_grid": "grid",
    "grid_size": "grid",
}
SCALAR_ATTRIBUTES = {
    "thread_index_in_simdgroup": "msl_cur->lane",
    "simdgroup_index_in_threadgroup": "msl_cur->sg",
    "thread_index_in_threadgroup": "msl_cur->lin",
    "simdgroups_per_threadgroup": "msl_cur->nsg",
    "dispatch_simdgroups_per_threadgroup": "msl_cur->nsg",
    "threads_per_simdgroup": "32",
    "thread_execution_width": "32",
}

_THREADGROUP_VARIABLE = re.compile(
    r"([;{}]\s*)threadgroup(\s+(?:const\s+)?[A-Za-z_][\w:]*(?:\s*<[^;{}<>]*>)?\s+[A-Za-z_]\w*\s*(?=[\[;,]))"
)
_EXPLICIT_INSTANTIATION = re.compile(r"^\s*template\s*\[\[host_name.*?;\s*$", re.M)


class KernelFault(Exception):
    """A kernel was refused or did something undefined; the message lists the reports."""


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter: a buffer (`buffer` is its index) or an attribute."""

    text: str
    name: str
    ctype: str
    buffer: int | None = None
    attribute: str | None = None
    is_reference: bool = False


def strip_comments(text: str) -> str:
    """`text` with comments blanked out, line numbers kept."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group(0)), text, flags=re.S)


def rewrite_threadgroup(text: str, replacement: str = "MSL_TGVAR") -> str:
    """`threadgroup T x[N];` becomes `MSL_TGVAR T x[N];`; pointers `threadgroup T* p` stay."""
    while True:
        rewritten = _THREADGROUP_VARIABLE.sub(lambda m: m.group(1) + replacement + m.group(2), text)
        if rewritten == text:
            return text
        text = rewritten


def split_arguments(text: str) -> list[str]:
    """Split at the commas outside all brackets."""
    parts, depth, current = [], 0, ""
    for ch in text:
        depth += (ch in "([{<") - (ch in ")]}>")
        if ch == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += ch
    return [*parts, current]


def parse_parameters(source: str, function: str) -> list[Parameter]:
    """The parameters of kernel `function` in MLX's generated text."""
    text = strip_comments(source)
    match = re.search(r"\[\[kernel\]\]\s*void\s+" + re.escape(function) + r"\s*\(", text)
    if match is None:
        raise KernelFault(f"no kernel {function} in the generated source")
    end, depth = match.end(), 1
    while depth:
        depth += (text[end] == "(") - (text[end] == ")")
        end += 1
    parameters: list[Parameter] = []
    for part in split_arguments(text[match.end() : end - 1]):
        part = " ".join(part.split())
        attribute = re.search(r"\[\[\s*(.*?)\s*\]\]\s*$", part)
        body = part[: attribute.start()].strip() if attribute else part
        name_match = re.search(r"(\w+)$", body)
        if attribute is None or name_match is None:
            raise KernelFault(f"parameter {part!r} of {function} has no attribute")
        name = name_match.group(1)
        ctype = body[: -len(name)].strip()
        buffer = re.match(r"buffer\((\d+)\)", attribute.group(1))
        if buffer:
            parameters.append(Parameter(part, name, ctype, int(buffer.group(1)), None, ctype.endswith("&")))
        else:
            parameters.append(Parameter(part, name, ctype, None, attribute.group(1)))
    return parameters


def _argument(p: Parameter) -> str:
    if p.buffer is not None:
        return f"msl_arg_{'r' if p.is_reference else 'p'}{{a[{p.buffer}]}}"
    if p.attribute in VECTOR_ATTRIBUTES:
        field = VECTOR_ATTRIBUTES[p.attribute]
        width = int(p.ctype[-1]) if p.ctype[-1] in "23" else 1
        return f"{p.ctype}({','.join(f'msl_cur->{field}[{i}]' for i in range(width))})"
    if p.attribute in SCALAR_ATTRIBUTES:
        return f"{p.ctype}({SCALAR_ATTRIBUTES[p.attribute]})"
    raise KernelFault(f"attribute {p.attribute} is not known to the harness")


def _entry(function: str, template: str, parameters: list[Parameter]) -> str:
    unchecked = '__attribute__((no_sanitize("thread","undefined")))'
    return (
        f'extern "C" {unchecked} void msl_entry(void** a)'
        f" {{ {function}{template}({', '.join(_argument(p) for p in parameters)}); }}\n"
        'extern "C" const char __start_msl_tg[] __attribute__((weak));\n'
        'extern "C" const char __stop_msl_tg[] __attribute__((weak));\n'
        'extern "C" void* msl_tg_base() { return (void*)__start_msl_tg; }\n'
        'extern "C" unsigned long msl_tg_size() { return __stop_msl_tg - __start_msl_tg; }\n'
        'extern "C" void* msl_pc_base() { return (void*)&msl_entry; }\n'
    )


def translation_unit(source: str, function: str, template: str, *, executable: bool) -> str:
    """C++ text for clang: the kernel, and an entry point when it is to be executed."""
    body = rewrite_threadgroup(strip_comments(_EXPLICIT_INSTANTIATION.sub("", source)))
    unit = PRELUDE + '#line 1 "kernel.metal"\n' + body + "\n"
    if executable:
        return unit + '#line 1 "entry"\n' + _entry(function, template, parse_parameters(source, function))
    return unit + (f"auto msl_instance_ = &{function}{template};\n" if template else "")
