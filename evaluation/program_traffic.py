"""Bytes that a compiled program moves between memory and a fast memory of a given size, read off its optimized HLO.

XLA's own `cost_analysis()["bytes accessed"]` adds the operands and results of every operation. It counts the body of a
loop once, and counts a block that never leaves the cache like an array that does: by it, attention by blocks moves more
than attention without. Here a body counts as often as it runs, and an array that fits into fast memory is free, but for
the program's arguments and results, which are read and written once at least.

    bytes = sum over operations x trips of operands and results larger than fast memory
            + arguments and results of the program that are not

A slice counts as what it takes, an update in place as what it puts. Still a model: it says nothing of arrays that fit
one by one but not together.
"""

import math
import re
from dataclasses import dataclass

# No work of their own: they name, group or reinterpret what is there.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"}
SLICES = {"dynamic-slice", "slice"}
REFUSED = {"conditional", "async-start", "call"}


@dataclass(frozen=True)
class Operation:
    """One line of HLO. `sizes`: bytes of its result's arrays; `rest`: its attributes."""

    name: str
    kind: str
    sizes: tuple[int, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(self.sizes)

    def called(self, attribute: str) -> str:
        return re.search(attribute + r"=%?([\w.\-]+)", self.rest).group(1)


Computation = dict[str, Operation]


def bytes_accessed(program: str, fast_memory: int = 0) -> int:
    """Bytes of one run of `compiled.as_text()`, with a fast memory of so many bytes.

    ValueError where the count cannot be known: a loop whose trip count XLA does not state, or a choice between
    computations.
    """
    computations = _parsed(program)
    entry = computations[""]
    moved = _of_computation(entry, computations, fast_memory)
    if not fast_memory:
        return moved
    root = next(o for o in entry.values() if o.is_root)
    ends = [size for o in entry.values() if o.kind == "parameter" for size in o.sizes] + list(root.sizes)
    return moved + sum(size for size in ends if size <= fast_memory)


def _of_computation(computation: Computation, computations: dict[str, Computation], fast: int) -> int:
    moved = 0
    for operation in computation.values():
        if operation.kind in FREE:
            continue
        if operation.kind in REFUSED:
            raise ValueError(f"{operation.name}: what a {operation.kind} moves is not known before it runs.")
        if operation.kind == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', operation.rest)
            if not trips:
                raise ValueError(f"{operation.name}: the trip count of this loop is not known.")
            body = computations[operation.called("body")]
            moved += int(trips.group(1)) * _of_computation(body, computations, fast)
            continue
        inner = computations[operation.called("calls")] if operation.kind == "fusion" else None
        operands = [computation[name] for name in operation.operands]
        for index, operand in enumerate(operands):
            if operand.bytes > fast:
                moved += _read(operation, index, operand.bytes, inner)
        if operation.bytes > fast:
            moved += _written(operation, operands, inner)
    return moved


def _read(operation: Operation, index: int, whole: int, inner: Computation | None) -> int:
    """Bytes of an operand that are read."""
    if inner is None:
        if operation.kind in SLICES:
            return operation.bytes if index == 0 else whole
        return 0 if operation.kind == "dynamic-update-slice" and index == 0 else whole
    parameter = next(o for o in inner.values() if o.kind == "parameter" and o.rest.startswith(f"({index})"))
    users = _users(parameter.name, inner)
    if users and all(user.kind in SLICES and at == 0 for user, at in users):
        return sum(user.bytes for user, _ in users)
    if users and all(user.kind == "dynamic-update-slice" and at == 0 for user, at in users):
        return 0
    return whole


def _users(name: str, computation: Computation) -> list[tuple[Operation, int]]:
    """(operation, which operand) for all that read a value, seen through bitcasts."""
    found = []
    for operation in computation.values():
        for at, operand in enumerate(operation.operands):
            if operand == name:
                found += _users(operation.name, computation) if operation.kind == "bitcast" else [(operation, at)]
    return found


def _written(operation: Operation, operands: list[Operation], inner: Computation | None) -> int:
    """Bytes of the result that are written."""
    if inner is None:
        return operands[1].bytes if operation.kind == "dynamic-update-slice" else operation.bytes
    root = next(o for o in inner.values() if o.is_root)
    while root.kind == "bitcast":
        root = inner[root.operands[0]]
    return inner[root.operands[1]].bytes if root.kind == "dynamic-update-slice" else operation.bytes


# ---- the text ----------------------------------------------------------------------------------------------

_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")


def _parsed(program: str) -> dict[str, Computation]:
    """Computation by name; "" is the entry."""
    computations: dict[str, Computation] = {}
    current: Computation = {}
    for line in re.sub(r"/\*.*?\*/", "", program).splitlines():
        if header := _HEADER.match(line):
            current = computations["" if header.group(1) else header.group(2)] = {}
        elif " = " in line and (found := _LINE.match(line)):
            operation = _operation(found.group(2), found.group(3), bool(found.group(1)))
            current[operation.name] = operation
    return computations


def _operation(name: str, text: str, is_root: bool) -> Operation:
    """`f32[2,3]{1,0} add(%a, %b), metadata=...`; the type may be a tuple in parentheses."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    kind, _, _ = text[end:].strip().partition("(")
    start = text.index("(", end)
    close = _closing(text, start)
    sizes = tuple(_size(*found) for found in _ARRAY.findall(text[:end]))
    operands = tuple(re.findall(r"%([\w.\-]+)", text[start:close]))
    return Operation(name, kind, sizes, operands, text[start:], is_root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def _size(dtype: str, dimensions: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group()) if re.search(r"\d", dtype) else 0
    return math.ceil(bits * math.prod(int(d) for d in dimensions.split(",") if d) / 8)
