"""What a compiled program sends between devices and multiplies, read from its HLO text.

`cost_analysis` counts the body of a loop once; here everything inside a loop counts as often as the loop runs. Bytes are
what one device sends, by the ring algorithms: a gather of parts of b bytes over n devices sends (n - 1) · b, a
reduction of b bytes twice (n - 1) / n · b, and one whose result is scattered half of that. Loops whose length is known
at run time only (the head's, over trained tokens) count as often as the caller says. Left out: work in custom kernels,
which HLO does not show, and the order of operations, so nothing here says how much of the sending is hidden.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

COLLECTIVES = (
    *("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4}
_BYTES |= {"u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0, "opaque": 0}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONSTANT = re.compile(r"constant\((-?\d+)\)")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. `operands` are names, `shape` the text of the result's type."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool


Computation = dict[str, Instruction]


@dataclass(frozen=True)
class Collective:
    """One instruction that sends, with all the times it runs. `devices` is one of its groups, `size` how many are in it."""

    kind: str
    operand_bytes: float
    size: int
    devices: tuple[int, ...]
    times: float
    dtype: str
    source: str
    """The operation of the traced program that it came from."""

    @property
    def sent(self) -> float:
        """Bytes that one device sends."""
        n = self.size
        share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}.get(self.kind, (n - 1) / n)
        if self.kind.startswith("collective-"):
            share = 1
        return self.operand_bytes * share * self.times


@dataclass
class Summary:
    """What a compiled program does on one device."""

    collectives: list[Collective] = field(default_factory=list)
    flops: float = 0.0
    """Of matrix products outside custom kernels."""
    kernels: dict[str, float] = field(default_factory=dict)
    """Calls of custom kernels, by target."""
    open_loops: list[str] = field(default_factory=list)
    """Loops whose length the text does not give."""
    chains: set[tuple[str, str]] = field(default_factory=set)
    """Collectives met so far that TPU programs spread over several computations."""

    def sent(self, devices: int | None = None) -> float:
        """Bytes that one device sends, in all or in groups of this size."""
        return sum(c.sent for c in self.collectives if devices in (None, c.size))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a module by name, and the name of the first to run."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    entry = ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text holds no ENTRY computation: expected optimized HLO")
    return computations, entry


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    end = _closing(right, 0) if right.startswith("(") else right.index(" ") - 1
    shape, rest = right[: end + 1], right[end + 1 :].strip()
    opcode, _, _ = rest.partition("(")
    last = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : last]
    # Other printers put each operand's type before its name.
    operands = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(re.findall(r"[A-Za-z_][\w.\-]*", inside))
    if opcode == "constant":
        operands = ()
    attributes = rest[last + 1 :] if opcode != "constant" else f"constant({inside})"
    root, name = left.startswith("ROOT "), left.removeprefix("ROOT ").lstrip("%")
    return Instruction(name, shape, opcode, operands, attributes, root)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unclosed parenthesis in HLO: {text[:200]}")


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays of a type's text: their dtypes and dimensions."""
    found = re.sub(r"\{[^}]*\}", "", shape)  # layouts
    return [(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in _ARRAY.findall(found)]


def _size(shape: str) -> float:
    return sum(math.prod(dims) * _BYTES.get(dtype, 1) for dtype, dims in arrays(shape))


def groups(attributes: str, devices: int) -> list[tuple[int, ...]]:
    """The groups of devices that a collective runs over; all `devices` are one group where none are given."""
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if listed:
        return [_numbers(part) for part in re.findall(r"\{([\d,]*)\}", listed[1])]
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        (count, size), dims = _numbers(iota[1]), _numbers(iota[2])
        order = _numbers(iota[3]) if iota[3] else tuple(range(len(dims)))
        flat = list(_transposed(dims, order))
        return [tuple(flat[i * size : (i + 1) * size]) for i in range(count)]
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, *device_ids=\(([\d,]*)\))? *\{([^}]*)\}", attributes)
    if mesh:
        names = re.findall(r"'([^']+)'=(\d+)", mesh[1])
        dims, chosen = tuple(int(n) for _, n in names), set(re.findall(r"'([^']+)'", mesh[3]))
        inner = tuple(i for i, (name, _) in enumerate(names) if name in chosen)
        outer = tuple(i for i in range(len(dims)) if i not in inner)
        flat, size = list(_transposed(dims, outer + inner)), math.prod(dims[i] for i in inner)
        return [tuple(flat[i : i + size]) for i in range(0, len(flat), size)]
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
    if pairs:
        return _chains([_numbers(part) for part in re.findall(r"\{([\d,]*)\}", pairs[1])])
    return [tuple(range(devices))]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _transposed(dims: tuple[int, ...], order: tuple[int, ...]) -> Iterator[int]:
    """0, 1, … laid out as `dims`, read with the axes in another order."""
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    for position in range(math.prod(dims)):
        index = 0
        for axis in reversed(order):
            position, digit = divmod(position, dims[axis])
            index += digit * strides[axis]
        yield index


def _chains(pairs: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The devices that are joined by pairs of sender and receiver."""
    sets: list[set[int]] = []
    for pair in pairs:
        touched = [s for s in sets if s & set(pair)]
        sets = [s for s in sets if not s & set(pair)] + [set(pair).union(*touched)]
    return [tuple(sorted(s)) for s in sets]


def summarize(text: str, devices: int, open_trips: float = 1.0) -> Summary:
    """Everything the program does on one of `devices`. Loops of unknown length count `open_trips` times."""
    computations, entry = parse(text)
    out = Summary()
    _walk(computations, entry, 1.0, out, devices, open_trips)
    return out


def _walk(
    computations: Mapping[str, Computation], name: str, times: float, out: Summary, devices: int, open_trips: float
) -> None:
    lines = computations[name]
    for line in lines.values():
        kind = line.opcode.removesuffix("-start")
        if kind in COLLECTIVES and not _seen(line, out):
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # how TPU programs write one: in a computation that slices the sum
            found = groups(line.attributes, devices)
            operand = sum(_size(lines[o].shape) for o in line.operands if o in lines)
            dtype = max(arrays(line.shape), key=lambda a: math.prod(a[1]), default=("", ()))[0]
            source = re.search(r'op_name="([^"]*)"', line.attributes)
            out.collectives.append(
                Collective(kind, operand, len(found[0]), found[0], times, dtype, source[1] if source else "")
            )
        elif line.opcode in ("dot", "convolution"):
            out.flops += times * _product_flops(lines, line)
        elif line.opcode == "custom-call":
            target = re.search(r'custom_call_target="([^"]*)"', line.attributes)
            if target:
                out.kernels[target[1]] = out.kernels.get(target[1], 0) + times
        if line.opcode in COLLECTIVES or line.opcode in ("async-update", "async-done", "reduce", "sort", "scatter"):
            continue  # what they call is arithmetic on single numbers, or was counted at the start
        inner = times
        if line.opcode == "while":
            trips = _trips(computations, lines, line)
            if trips is None:
                out.open_loops.append(line.name)
            inner *= open_trips if trips is None else trips
        called = [target for _, target in _CALLED.findall(line.attributes)]
        for branches in _BRANCHES.findall(line.attributes):
            called += re.findall(r"[\w.\-]+", branches)
        for target in called:
            if target in computations:
                _walk(computations, target, inner, out, devices, open_trips)


def _seen(line: Instruction, out: Summary) -> bool:
    """Whether it is a later piece of a collective that was counted: one that runs beside other work is written in the
    computation that starts it, in those it runs beside and in the one that ends it, under one chain and channel."""
    chain = re.search(r'chain_id="([^"]*)"', line.attributes)
    if chain is None:
        return False
    channel = re.search(r"channel_id=(\d+)", line.attributes)
    key = (chain[1], channel[1] if channel else "")
    seen = key in out.chains
    out.chains.add(key)
    return seen


def _product_flops(lines: Computation, line: Instruction) -> float:
    """Two for each multiplication and addition of a matrix product."""
    result = math.prod(arrays(line.shape)[0][1])
    shapes = [arrays(lines[o].shape)[0][1] for o in line.operands[:2] if o in lines]
    if len(shapes) != 2:
        return 0.0
    if line.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.attributes)
        return 2.0 * result * math.prod(shapes[0][i] for i in _numbers(contracted[1] if contracted else ""))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.attributes)
    if labels is None:
        return 0.0
    work = 2.0 * result * shapes[1][labels[2].index("i")]
    window = re.search(r"window=\{([^}]*)\}", line.attributes)
    if window is None:
        return work
    fields = dict(part.split("=") for part in window[1].split())
    for place, size in enumerate(fields["size"].split("x")):
        of = {name: fields[name].split("x")[place] for name in fields}
        sides = shapes[0][labels[1].index(str(place))], arrays(line.shape)[0][1][labels[3].index(str(place))]
        work *= _taps(int(size), of, *sides)
    return work


def _taps(size: int, window: Mapping[str, str], inputs: int, outputs: int) -> float:
    """How many of a kernel's `size` entries meet a number of the input, for the mean output. A batch written as space is
    spread out, or padded, so far that each output meets one."""
    stride, spread, step = (int(window.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(window.get("pad", "0_0").partition("_")[0])
    met = 0
    for entry in range(size):
        # Outputs o with a number at o * stride + entry * step - before, in an input that is spread with holes.
        places = (o * stride + entry * step - before for o in range(outputs))
        met += sum(1 for place in places if place % spread == 0 and 0 <= place // spread < inputs)
    return met / outputs


def _trips(computations: Mapping[str, Computation], lines: Computation, loop: Instruction) -> float | None:
    """How often a loop runs, or None where that depends on data."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return float(known[1])
    names = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", loop.attributes))
    condition, body = computations[names["condition"]], computations[names["body"]]
    root = next(line for line in condition.values() if line.root)
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return None
    counter, limit = (condition.get(o) for o in root.operands)
    if counter is None or limit is None or counter.opcode != "get-tuple-element":
        return None
    start = lines.get(loop.operands[0])
    index, first = _index(counter), _carried(lines, start, _index(counter))
    last = _constant(limit) if limit.opcode == "constant" else _carried(lines, start, _index(limit))
    if last is None:
        return None
    end = next(line for line in body.values() if line.root)
    step = _step(body, end, index)
    return math.ceil((last - (first or 0)) / step)


def _index(line: Instruction) -> int:
    found = re.search(r"index=(\d+)", line.attributes)
    return int(found[1]) if found else -1


def _constant(line: Instruction | None) -> int | None:
    found = _CONSTANT.search(line.attributes) if line is not None else None
    return int(found[1]) if found else None


def _carried(lines: Computation, start: Instruction | None, index: int) -> int | None:
    """The constant that a loop's tuple starts with at `index`, if it is one."""
    if start is None or start.opcode != "tuple" or not 0 <= index < len(start.operands):
        return None
    value = lines.get(start.operands[index])
    while value is not None and value.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
        value = lines.get(value.operands[0])
    return _constant(value) if value is not None and value.opcode == "constant" else None


def _step(body: Computation, end: Instruction, index: int) -> int:
    """What a loop adds to its counter."""
    if end.opcode == "tuple" and index < len(end.operands):
        update = body.get(end.operands[index])
        if update is not None and update.opcode == "add":
            added = [_constant(body.get(o)) for o in update.operands]
            return next((n for n in added if n), 1)
    return 1
