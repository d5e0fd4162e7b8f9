"""What Apple's compiler refuses, or what bites on Metal, and clang's C++ mode lets pass."""

from __future__ import annotations

import re

from tests.msl_on_cpu.text import strip_comments

_WORDS = [
    (r"\bdouble\b", "no double in MSL"),
    (r"\b(try|catch|throw|dynamic_cast|virtual|goto|new|delete|thread_local)\b", "not in MSL"),
    (r"\bstd::", "no std:: in MSL"),
    (r"\blong\s+long\b", "no long long in MSL"),
    (r"#include\s*<(?!metal_)", "only metal_* headers exist"),
    (r"\[[&=]?[^\[\]]*\]\s*\([^()]*\)\s*(?:->\s*\w+\s*)?\{", "lambda: not before Metal 4"),
]
_SCALAR = (
    r"(?:bool|char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float"
    r"|(?:u?int(?:8|16|32|64)|float16|bfloat16|size)_t|(?:half|float|uint|int|uchar|ushort|short|char)[234]|T|U|A|E|quad)"
)
_SPACE = r"(?:const\s+|volatile\s+|constexpr\s+|device\s+|constant\s+|threadgroup\s+|thread\s+|static\s+)*"
_POINTER = re.compile(
    rf"(?<![\w:>]){_SPACE}{_SCALAR}(?:\s+(?:const\s+|device\s+|thread\s+|threadgroup\s+|constant\s+)?)?"
    r"\s*[*&]\s*(?:const\s+)?\w+\s*(?=[,)=;\[])"
)
_PROGRAM_VARIABLE = re.compile(
    r"\s*(?:static\s+|inline\s+|const\s+|constexpr\s+)*[A-Za-z_]\w*(?:<[^;()]*>)?\s+[A-Za-z_]\w*\s*(\[[^\]]*\]\s*)*(=.*)?$",
    re.S,
)
_NOT_A_VARIABLE = re.compile(r"\b(constant|using|typedef|return|template|struct|namespace|static_assert)\b")


def lint(source: str) -> list[str]:
    """Findings in a piece of MSL (a header, or a body in braces), one line each."""
    text = strip_comments(source)
    findings = [] if source.isascii() else ["MLX hands the text over as ASCII, comments included"]
    findings += [
        f"line {_line(text, m.start())}: {why}: {m.group(0).strip()[:40]!r}"
        for pattern, why in _WORDS
        for m in re.finditer(pattern, text)
    ]
    findings += [
        f"line {_line(text, m.start())}: pointer or reference without address space: {m.group(0).strip()!r}"
        for m in _POINTER.finditer(text)
        if not re.search(r"\b(device|constant|threadgroup|thread)\b", m.group(0))
    ]
    return findings + _scopes(text)


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _scopes(text: str) -> list[str]:
    """Program-scope variables outside `constant`, static locals, members without an address space."""
    findings, start, scopes = [], 0, list[str]()
    for m in re.finditer(r"[{};]", text):
        segment, line = text[start : m.start()], _line(text, m.start())
        at_program_scope = not any(s != "namespace" for s in scopes)
        shown = repr(" ".join(segment.split())[-60:])
        if m.group() == "{":
            if at_program_scope and re.search(r"\w\s*(\[[^\]]*\]\s*)*=\s*$", segment) and "constant" not in segment:
                findings.append(f"line {line}: program-scope variable outside constant: {shown}")
            member = scopes and scopes[-1] == "struct" and re.search(r"\)\s*(const)?\s*$", segment)
            if member and not re.search(r"\bstatic\b", segment):
                findings.append(f"line {line}: member function without address space: {shown}")
            is_struct = re.search(r"\b(struct|class|union)\s+\w+[^()]*$", segment)
            scopes.append("struct" if is_struct else "namespace" if "namespace" in segment else "body")
        elif m.group() == "}":
            if scopes:
                scopes.pop()
        elif at_program_scope:
            last = segment.split("\n\n")[-1]
            if _PROGRAM_VARIABLE.match(last) and not _NOT_A_VARIABLE.search(last):
                findings.append(f"line {line}: program-scope variable outside constant: {shown}")
        elif scopes[-1] == "struct" and re.match(r"\s*static\b", segment) and "constant" not in segment:
            findings.append(f"line {line}: static member outside constant: {shown}")
        elif scopes[-1] == "body" and re.match(r"\s*static\b", segment) and "constant" not in segment:
            findings.append(f"line {line}: static local variable: {shown}")
        start = m.end()
    return findings
