"""How often an algorithm has to walk over a sequence: the pass counter of FuseMax (Nayak et al. 2024,
arXiv 2406.10491).

An algorithm is written as a cascade of Einsums. A pass over a rank is a walk over its whole fibre that has to be
finished before the next Einsum can start on it: a maximum over the keys has to be known before the first exponential
can be taken. An algorithm of more than one pass needs a fast memory that grows with the fibre, or has to move it again.

    "GM[p] = QK[m,p]"                     an Einsum: ranks that only the inputs have (m) are reduced
    "RM[m1+1,p] = RM[m1,p] LM[m1,p]"      a recurrence along the iterative rank m1
    "AV[f,p] = RNV[m1.last,f,p] ..."      its last value

What is done with the inputs (product, exp of a difference) changes no pass and is not written; the operator of the
reduction is named beside it. Passes are derived from who reads what, never typed in.

Taken from the paper: the notion of a pass, and that attention takes 3, 2 or 1; the one-pass cascade is as its authors
published it (github.com/FPSG-UIUC/accelerator-zoo, notebook fusemax). Our reading, since only the abstract and that
cascade were at hand: the two-pass cascade is the one that defers the division; passes over a partitioned rank are those
over its outer part, a block of the inner part being held; a value that is streamed in one pass and read in a later one
is written to memory and read back (`traffic`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

HERE, NEXT, LAST = "", "+1", ".last"


class Operand(NamedTuple):
    """A tensor with one (rank, place) an index; places other than HERE stand on iterative ranks."""

    tensor: str
    indices: tuple[tuple[str, str], ...]

    @property
    def ranks(self) -> tuple[str, ...]:
        """Those that are walked: the last value of a recurrence has no place on its rank any more."""
        return tuple(rank for rank, place in self.indices if place != LAST)


@dataclass(frozen=True)
class Einsum:
    """output = inputs; `reduce` names the operator of the reduction, None where there is none."""

    output: Operand
    inputs: tuple[Operand, ...]
    reduce: str | None = None

    @property
    def ranks(self) -> set[str]:
        return {rank for operand in (self.output, *self.inputs) for rank in operand.ranks}


@dataclass(frozen=True)
class Cascade:
    """Einsums in the order of the paper. `parts`: a partitioned rank -> its (outer, inner) part."""

    name: str
    einsums: tuple[Einsum, ...]
    parts: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self):
        made = [e.output.tensor for e in self.einsums]
        for name in made:
            if made.count(name) > 1:
                raise ValueError(f"{self.name}: {name} is made by {made.count(name)} Einsums.")
        iterative = {rank for e in self.einsums for rank, place in e.output.indices if place == NEXT}
        for e in self.einsums:
            reduced = {r for i in e.inputs for r in i.ranks} - set(e.output.ranks)
            if bool(reduced) != (e.reduce is not None):
                raise ValueError(f"{self.name}: {e.output.tensor} reduces {sorted(reduced)} by {e.reduce}.")
            for operand in (e.output, *e.inputs):
                for rank, place in operand.indices:
                    if place != HERE and rank not in iterative:
                        raise ValueError(
                            f"{self.name}: {operand.tensor} has {rank}{place}, but {rank} has no recurrence."
                        )

    @property
    def inputs(self) -> dict[str, Operand]:
        """What no Einsum makes."""
        made = {e.output.tensor for e in self.einsums}
        return {i.tensor: i for e in self.einsums for i in e.inputs if i.tensor not in made}

    @property
    def outputs(self) -> dict[str, Operand]:
        """What no Einsum reads."""
        read = {i.tensor for e in self.einsums for i in e.inputs}
        return {e.output.tensor: e.output for e in self.einsums if e.output.tensor not in read}

    def walked(self, rank: str) -> str:
        """The rank whose fibre a pass walks: the outer part of a partitioned one."""
        walked = self.parts[rank][0] if rank in self.parts else rank
        known = {r for e in self.einsums for r in e.ranks}
        if walked not in known:
            raise ValueError(f"{self.name} has no rank {rank}; it has {', '.join(sorted(known | set(self.parts)))}.")
        return walked


def einsum(text: str, reduce: str | None = None) -> Einsum:
    """ "QK[m,p] = Q[e,p] K[e,m]" as an `Einsum`; ValueError where it is not of that form."""
    left, equals, right = text.partition("=")
    operands = [[_operand(*found) for found in _OPERAND.findall(side)] for side in (left, right)]
    if not equals or len(operands[0]) != 1 or not operands[1] or _OPERAND.sub("", left + right).strip():
        raise ValueError(f"{text!r} is not of the form 'Z[m] = A[k,m] B[k]'.")
    return Einsum(operands[0][0], tuple(operands[1]), reduce)


_OPERAND = re.compile(r"(\w+)\[([^\]]*)\]")


def _operand(name: str, indices: str) -> Operand:
    parsed = []
    for index in filter(None, (i.strip() for i in indices.split(","))):
        place = next((p for p in (NEXT, LAST) if index.endswith(p)), HERE)
        parsed.append((index.removesuffix(place), place))
    return Operand(name, tuple(parsed))


def passes(cascade: Cascade, rank: str) -> int:
    """Passes over `rank` that the dependencies force.

    An Einsum that walks the rank runs in the pass in which its streamed inputs (which have the rank) are made, and
    after every pass that made one of its whole inputs (in which the rank was reduced, or that are a recurrence's last
    value). ValueError where a value would be needed before it is whole.
    """
    return max(_pass_of(cascade, cascade.walked(rank)).values())


def _pass_of(cascade: Cascade, rank: str) -> dict[str, int]:
    """Tensor -> the pass over `rank` in which it is streamed, or after which it is whole; 0: none is needed."""
    number = dict.fromkeys(cascade.inputs, 0)
    number |= {e.output.tensor: int(rank in e.ranks) for e in cascade.einsums}
    has_rank = {e.output.tensor: rank in e.output.ranks for e in cascade.einsums}
    # A recurrence reads what stands below it, so one sweep is not enough; without a contradiction as many as there are
    # Einsums are.
    for _ in range(len(cascade.einsums) + 1):
        before = dict(number)
        for e in cascade.einsums:
            walks = rank in e.ranks
            for i in e.inputs:
                whole = i.tensor in has_rank and not (has_rank[i.tensor] and rank in i.ranks)
                needed = number[i.tensor] + (1 if walks and whole and number[i.tensor] else 0)
                number[e.output.tensor] = max(number[e.output.tensor], needed)
        if number == before:
            return number
    raise ValueError(f"{cascade.name}: a value along {rank} is needed before it is whole.")


def traffic(
    cascade: Cascade,
    rank: str,
    sizes: Mapping[str, int],
    itemsize: int = 4,
    fast_memory: int | None = None,
) -> int:
    """Bytes that move between memory and fast memory, at the least.

        inputs with the rank     read once a pass that uses them
        streamed intermediates   written once, and read once a later pass that uses them; else free
        other inputs, outputs    read or written once

    `sizes`: of every rank, in elements (parts of a partitioned rank: their product is its size). `fast_memory`: its
    bytes; where it holds the part of one fibre that later passes need again, all passes cost as much as one. None: it
    holds no fibre. What is reduced over the rank, and the state of recurrences, is held in any case. An algorithm that
    computes a value anew instead of storing it is another cascade.
    """
    walked = cascade.walked(rank)
    number = _pass_of(cascade, walked)
    operands = {**cascade.inputs, **{e.output.tensor: e.output for e in cascade.einsums}}
    missing = {r for o in operands.values() for r, _ in o.indices} - set(sizes)
    if missing:
        raise ValueError(f"sizes lacks the ranks {', '.join(sorted(missing))}.")
    size = lambda ranks: math.prod(sizes[r] for r in ranks)
    uses = {name: set() for name in operands}
    for e in cascade.einsums:
        for i in e.inputs:
            if walked in i.ranks and walked in e.ranks:
                uses[i.tensor].add(number[e.output.tensor])
    again = {name for name, at in uses.items() if len(at - {number[name]}) > (name in cascade.inputs)}
    independent = {r for o in cascade.outputs.values() for r in o.ranks} - {walked, *cascade.parts.get(rank, ())}
    held = sum(itemsize * size(set(operands[name].ranks) - independent) for name in again)
    fits = fast_memory is not None and held <= fast_memory
    moved = 0
    for name, operand in operands.items():
        once = size(operand.ranks)
        if name in cascade.inputs:
            moved += once * (1 if fits else max(1, len(uses[name])))
        elif name in cascade.outputs:
            moved += once
        elif name in again and not fits:
            moved += once * (1 + len(uses[name] - {number[name]}))
    return moved * itemsize


# ---- attention: queries p, keys m, head sizes e and f ------------------------------------------------------

_SCORES = einsum("QK[m,p] = Q[e,p] K[e,m]", "sum")
_SHIFTED = (einsum("GM[p] = QK[m,p]", "max"), einsum("SN[m,p] = QK[m,p] GM[p]"), einsum("SD[p] = SN[m,p]", "sum"))

ATTENTION_NAIVE = Cascade(
    "attention, divided before the values",
    (_SCORES, *_SHIFTED, einsum("A[m,p] = SN[m,p] SD[p]"), einsum("AV[f,p] = A[m,p] V[f,m]", "sum")),
)
ATTENTION_DEFERRED = Cascade(
    "attention, divided after the values",
    (_SCORES, *_SHIFTED, einsum("SNV[f,p] = SN[m,p] V[f,m]", "sum"), einsum("AV[f,p] = SNV[f,p] SD[p]")),
)
ATTENTION_ONLINE = Cascade(
    "attention with a running maximum, sum and output",
    (
        einsum("QK[m1,m0,p] = Q[e,p] K[e,m1,m0]", "sum"),
        einsum("LM[m1,p] = QK[m1,m0,p]", "max"),
        einsum("RM[m1+1,p] = RM[m1,p] LM[m1,p]"),
        einsum("SLN[m1,m0,p] = QK[m1,m0,p] RM[m1+1,p]"),
        einsum("PRM[m1,p] = RM[m1,p] RM[m1+1,p]"),
        einsum("SPD[m1,p] = PRM[m1,p] RD[m1,p]"),
        einsum("SLD[m1,p] = SLN[m1,m0,p]", "sum"),
        einsum("RD[m1+1,p] = SPD[m1,p] SLD[m1,p]"),
        einsum("SPNV[m1,f,p] = PRM[m1,p] RNV[m1,f,p]"),
        einsum("SLNV[m1,f,p] = SLN[m1,m0,p] V[f,m1,m0]", "sum"),
        einsum("RNV[m1+1,f,p] = SPNV[m1,f,p] SLNV[m1,f,p]"),
        einsum("AV[f,p] = RNV[m1.last,f,p] RD[m1.last,p]"),
    ),
    {"m": ("m1", "m0")},
)

# ---- softmax of rows r along i: the forms of ops/softmax ---------------------------------------------------

SOFTMAX_THREE_PASS = Cascade(
    "softmax: maximum; sum; output",
    (
        einsum("M[r] = X[r,i]", "max"),
        einsum("E[r,i] = X[r,i] M[r]"),
        einsum("S[r] = E[r,i]", "sum"),
        einsum("Y[r,i] = X[r,i] M[r] S[r]"),  # the exponential taken anew
    ),
)
SOFTMAX_TWO_PASS = Cascade(
    "softmax: sum of (mantissa, exponent) pairs; output",
    (
        einsum("PN[r,i] = X[r,i]"),
        einsum("S[r] = PN[r,i]", "sum of pairs"),
        einsum("Y[r,i] = X[r,i] S[r]"),
    ),
)
SOFTMAX_ONLINE = Cascade(
    "softmax: running maximum and sum; output",
    (
        einsum("LM[i1,r] = X[r,i1,i0]", "max"),
        einsum("RM[i1+1,r] = RM[i1,r] LM[i1,r]"),
        einsum("E[r,i1,i0] = X[r,i1,i0] RM[i1+1,r]"),
        einsum("LS[i1,r] = E[r,i1,i0]", "sum"),
        einsum("RS[i1+1,r] = RS[i1,r] RM[i1,r] RM[i1+1,r] LS[i1,r]"),
        einsum("Y[r,i1,i0] = X[r,i1,i0] RM[i1.last,r] RS[i1.last,r]"),
    ),
    {"i": ("i1", "i0")},
)
