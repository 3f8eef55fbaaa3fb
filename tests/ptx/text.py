"""PTX as text -> instructions with their operands taken apart (PTX ISA, section 4)."""

import re
import struct
from dataclasses import dataclass, field

SIZES = {"pred": 0, "b8": 1, "b16": 2, "b32": 4, "f32": 4, "b64": 8, "f64": 8, "b128": 16}


@dataclass(frozen=True)
class Instruction:
    """``@guard op args``; an argument is a name, a number, a list (braces), or ``(base, offset)`` (brackets)."""

    op: tuple[str, ...]  # "mad.lo.s32" in parts
    args: tuple
    guard: str | None
    negated: bool
    text: str


@dataclass
class Program:
    name: str
    params: list[str]
    threads: int
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of a register, by name or by what precedes its number

    def size(self, register: str) -> int:
        """In bytes; 0 for a predicate."""
        if register not in self.sizes:
            self.sizes[register] = self.sizes[register.rstrip("0123456789")]
        return self.sizes[register]


def number(text: str) -> int | None:
    """An integer, or the bits of a float literal; None for a name."""
    if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return int(m[1], 16)
    if m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return int(m[1], 16)
    if m := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", text):
        value = int(m[2], 16) if m[2][:2] in ("0x", "0X") else int(m[2])
        return -value if m[1] else value
    if m := re.fullmatch(r"-?\d+\.\d*", text):
        return struct.unpack("<I", struct.pack("<f", float(text)))[0]
    return None


def split(text: str) -> list[str]:
    """At commas that are in no brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts if p.strip()]


def operand(text: str):
    if text[0] == "{":
        return [operand(p) for p in split(text[1:-1])]
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return operand(base), number(offset or "0")
    value = number(text)
    return text if value is None else value


def instruction(text: str) -> Instruction:
    m = re.fullmatch(r"(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
    assert m, f"not an instruction: {text}"
    negated, guard, op, args = m.groups()
    return Instruction(tuple(op.split(".")), tuple(operand(a) for a in split(args)), guard, bool(negated), text)


def own_labels(scope: re.Match) -> str:
    """Labels of inline assembly are their scope's own: they get names that no others have."""
    text = scope[0]
    for name in re.findall(r"^\s*(\w+):\s", text, re.MULTILINE):
        text = re.sub(rf"\b{name}\b", f"{name}_{scope.start()}", text)
    return text


def parse(ptx: str) -> Program:
    """The one kernel of a module that Triton made."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    kernel = r"\.visible \.entry (.*?)\n\{\n(.*?)\n\}\n(?=\s*(?:\.file|\.section|$))"
    head, body = re.search(kernel, ptx, re.DOTALL).groups()
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", head)
    params = re.findall(r"\.param .*? (\w+)(?=,?\n)", head)
    program = Program(head.split("(")[0].strip(), params, int(threads[1]))
    # scopes of inline assembly only name temporaries; the braces that open and close them are alone or lead a line
    body = re.sub(r"^\s*\.(loc|pragma)[^\n]*", "", body, flags=re.MULTILINE)
    body = re.sub(r"\{[^{}]*\}", own_labels, body)
    for statement in re.split(r";|(?<=:)\n", body):
        statement = re.sub(r"^[\s{}]+", "", statement).strip()
        while m := re.match(r"([$\w]+):\s*", statement):
            program.labels[m[1]] = len(program.code)
            statement = re.sub(r"^[\s{}]+", "", statement[m.end() :])
        if m := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL):
            for name in m[2].split(","):
                program.sizes[re.sub(r"<\d+>", "", name.strip())] = SIZES[m[1]]
        elif statement:
            program.code.append(instruction(" ".join(statement.split())))
    return program
