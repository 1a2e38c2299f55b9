"""Measures one reloaded network: what it gets right, what it costs; and the trivial methods beside it.

A `Subject` is a network as plain data and functions, so that this room needs neither training nor
compression.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lissom.evaluation import costs, energy, few_shot, floors, memory, mixtures
from lissom.evaluation.latency import latency_measurements, measure_interleaved
from lissom.evaluation.metrics import JUDGED, METRICS
from lissom.evaluation.rows import Identity, Measurement, Provenance, Row, measure
from lissom.models import products, tallies

ROTATED = 4  # different inputs a latency is taken over
COMPARED = 4  # test examples on which a transformed network's outputs are compared with those of the trained one


@dataclasses.dataclass
class Subject:
    """One network to be measured. `blank` is its row without measurements, `state` is (params, stats, frozen),
    `merge(graph, state)` the network, `judge` an objective's (network, batch, key) -> {name: (sum, count)}, `answers`
    its (network, inputs, **given) -> output, `batches()` the test set; `adaptation` what an episode's support makes of
    the network, None where it learns from none."""

    run: str
    blank: Row
    graph: Any
    state: tuple
    merge: Callable
    judge: Callable
    answers: Callable
    adaptation: Callable | None
    batches: Callable[[], Iterable[dict]]
    examples: Sequence[dict]
    kind: str
    vocab_size: int | None
    latency_batches: tuple[int, ...]
    repeats: int
    artefact_bytes: int
    times: Mapping[str, float]
    decode_length: int = 0  # tokens of a sequence whose last one is timed; 0: as many as the examples have
    floor: bool = False  # whether it wants the trivial methods beside it
    simulated: bool = False  # whether it imitates arithmetic of few bits: its times are not those of such
    further: Sequence[tuple[Mapping[str, Any], Callable[[], Iterable[dict]]]] = ()  # test sets of other settings
    measurements: list[Measurement] = dataclasses.field(default_factory=list)

    def forward(self, params: Any, stats: Any, frozen: Any, *given: jax.Array) -> jax.Array:
        """The network's output for a batch of what it is given (`_batches_of`)."""
        inputs, *more = given
        others = dict(zip(_given(self.examples)[1:], more, strict=True))
        return self.answers(self.merge(self.graph, (params, stats, frozen)), inputs, **others)

    def adapted(self, params: Any, stats: Any, frozen: Any, inputs: jax.Array, labels: jax.Array) -> Any:
        """What a batch of supports makes of the network."""
        network = self.merge(self.graph, (params, stats, frozen))
        return self.adaptation(network, support_inputs=inputs, support_labels=labels)

    @property
    def decodes(self) -> bool:
        """Whether the network continues sequences through a cache."""
        return hasattr(self.merge(self.graph, self.state), "extend")

    @property
    def period(self) -> int:
        """Decoding costs the same again after so many tokens."""
        return getattr(self.merge(self.graph, self.state), "period", 1)

    @property
    def clocked(self) -> str:
        """The kind of its times."""
        return "simulated" if self.simulated else "measured"

    def row(self) -> Row:
        """What was measured, as a row."""
        return dataclasses.replace(self.blank, measurements=tuple(self.measurements))


def imitates(network: nnx.Module) -> bool:
    """Whether a layer's quantizer computes in other arithmetic than the one that it is about."""
    quantizers = (getattr(node, "quantizer", None) for _, node in nnx.iter_graph(network))
    return any(quantizer.simulated for quantizer in quantizers if quantizer is not None)


def measure_subject(subject: Subject) -> None:
    """Everything but latency: test means, parameters, bytes, FLOPs of one example."""
    note = subject.measurements.append
    judge = jax.jit(lambda state, batch, key: subject.judge(subject.merge(subject.graph, state), batch, key))
    for settings, batches in (({}, subject.batches), *subject.further):
        totals, queries = _totals(subject, judge, batches())
        subject.measurements += _test_means(subject, totals, settings, queries)
        if not settings:
            subject.measurements += _modelled(subject, totals)
    subject.measurements += _corruption_accuracy(subject.measurements)
    nodes = nnx.iter_graph(subject.merge(subject.graph, subject.state))
    further = sum(getattr(node, "further_scalars", 0) for _, node in nodes)  # of kernels that are packed
    count = memory.parameter_count((subject.state[0], subject.state[2])) + further
    note(measure("parameters", count, "compiled"))
    note(measure("parameter_bytes", memory.parameter_bytes((subject.state[0], subject.state[2])), "compiled"))
    note(measure("artefact_bytes", subject.artefact_bytes))
    one = _batches_of(subject.examples, 1)[0]
    note(measure("flops", costs.count(subject.forward, *subject.state, *one).flops, "compiled", batch=1))
    for name, value in subject.times.items():
        note(measure(name, value, "compiled" if METRICS[name].unit in ("B", "FLOP") else "measured"))
    if subject.decodes:
        network, length = subject.merge(subject.graph, subject.state), one[0].shape[1]
        init_cache = functools.partial(network.init_cache, 1)
        note(measure("cache_bytes", memory.cache_bytes(init_cache, length), "compiled", length=length))
        note(measure("cache_bytes_per_token", memory.cache_bytes_per_token(init_cache, length), "compiled"))


def few_bits(subjects: Sequence[Subject]) -> None:
    """What products with kernels cost by their bits, where one of the networks has some of few; a float counts as
    16."""
    calls = {id(subject): _products(subject) for subject in subjects}
    if all(call.quantizer is None for found in calls.values() for call in found[1]):
        return
    bits = lambda call: 16 if call.quantizer is None else call.quantizer.bits
    for subject in subjects:
        found, batch = calls[id(subject)], max(subject.latency_batches)
        rounding = sum(call.quantizer.rounding_operations(call) for call in found[batch] if call.quantizer is not None)
        total = sum(call.multiply_adds * bits(call) for call in found[1])
        subject.measurements.append(measure("bit_operations", total, "compiled", batch=1))
        if rounding:
            subject.measurements.append(measure("rounding_operations", rounding, "compiled", batch=batch))


def _products(subject: Subject) -> dict[int, list[products.Call]]:
    """Of one example, and of the largest batch."""
    found = {}
    for size in {1, max(subject.latency_batches)}:
        with products.noted() as found[size]:
            jax.eval_shape(subject.forward, *subject.state, *_batches_of(subject.examples, size)[0])
    return found


def _totals(subject: Subject, judge: Callable, batches: Iterable[dict]) -> tuple[tallies.Totals, int]:
    """(what the objective judges of one test set, summed; the queries of an episode, where it is of episodes)."""
    totals: tallies.Totals = {}
    queries = 0
    for batch in batches:
        tallies.add(totals, judge(subject.state, batch, jax.random.key(0)))
        queries = batch["labels"].shape[1] if subject.kind == "episode" else 0
    return totals, queries


def _modelled(subject: Subject, totals: tallies.Totals) -> list[Measurement]:
    """The energies of a network that counts what its layers do."""
    if "layer_activity" not in totals:
        return []
    activity, _ = totals["layer_activity"]
    work = subject.merge(subject.graph, subject.state).work()
    operations, traffic = energy.energy(work, activity[:, 2] / activity[:, 3])
    return [
        measure("inference_energy", operations + traffic, "modelled"),
        measure("operation_energy", operations, "modelled"),
    ]


def _test_means(
    subject: Subject, totals: tallies.Totals, settings: Mapping[str, Any], queries: int
) -> list[Measurement]:
    """The means of one test set, each of whose episodes has so many `queries`. `settings`, by which it is another than
    the run's own, stand in the conditions; of such a one there are only `JUDGED`: what layers say of themselves they
    say of the run's own."""
    tokens, found = subject.kind == "tokens", []
    for name, (mean, count) in tallies.means(totals).items():
        if name not in METRICS:  # what a layer of another package reports stands in metrics.jsonl
            continue
        name = "token_accuracy" if name == "accuracy" and tokens else name
        if settings and name not in JUDGED:
            continue
        value = mean if math.isfinite(mean) else None
        conditions = {"tokens" if tokens else "examples": int(count), **settings}
        if subject.kind == "episode":  # counted are episodes, judged their queries
            conditions = {"examples": int(count) * queries, **settings}
        found.append(measure(name, value, **conditions))
        if name == "loss" and tokens and subject.vocab_size == 256 and value is not None:
            found.append(measure("bits_per_byte", value / math.log(2), **conditions))
    return found


def _corruption_accuracy(found: Sequence[Measurement]) -> list[Measurement]:
    """The mean of the accuracies on corrupted test sets, each counting alike; none where there are no such sets."""
    sets = [entry for entry in found if entry.name == "accuracy" and "corruption" in entry.conditions]
    if not sets:
        return []
    of = lambda key: " ".join(dict.fromkeys(str(entry.conditions[key]) for entry in sets))
    mean = math.fsum(entry.value for entry in sets) / len(sets)
    conditions = {"of": of("corruption"), "severities": of("severity"), "examples": sets[0].conditions["examples"]}
    return [measure("corruption_accuracy", mean, **conditions)]


def compare_outputs(trained: Subject, transformed: Sequence[Subject]) -> None:
    """Notes of each network the largest difference of an output from that of the one it was made from."""
    if not transformed:
        return
    inputs = _batches_of(trained.examples, min(COMPARED, len(trained.examples)))[0]
    outputs = lambda subject: jax.jit(subject.forward)(*subject.state, *inputs)
    apart = lambda a, b: jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max()
    before = outputs(trained)
    for subject in transformed:
        largest = max(jax.tree.leaves(jax.tree.map(apart, outputs(subject), before)))
        subject.measurements.append(measure("logit_error", largest, examples=len(inputs[0])))


def latencies(subjects: Sequence[Subject]) -> None:
    """Forward latency of all subjects of a task, interleaved, at each batch size, and the compiled peak
    memory at the largest. Inputs are test examples, rotated."""
    for batch in sorted({size for subject in subjects for size in subject.latency_batches}):
        candidates = {}
        for number, subject in enumerate(subjects):
            if batch not in subject.latency_batches:
                continue
            inputs = _batches_of(subject.examples, batch)
            compiled = jax.jit(subject.forward).lower(*subject.state, *inputs[0]).compile()
            bound = functools.partial(compiled, *subject.state)
            candidates[number] = (bound, inputs)
            if batch == max(subject.latency_batches):
                subject.measurements.append(memory.peak_measurement(compiled, batch=batch))
        repeats = max(subjects[number].repeats for number in candidates)
        for number, latency in measure_interleaved(candidates, repeats=repeats).items():
            subjects[number].measurements += latency_measurements(latency, batch, subjects[number].clocked)


def adapting(subjects: Sequence[Subject]) -> None:
    """Time in which the networks that learn from episodes adapt to as many supports as each batch has, interleaved; and
    the compiled peak memory of the largest."""
    subjects = [subject for subject in subjects if subject.adaptation is not None]
    for batch in sorted({size for subject in subjects for size in subject.latency_batches}):
        candidates = {}
        for number, subject in enumerate(subjects):
            if batch not in subject.latency_batches:
                continue
            supports = [arrays[-2:] for arrays in _batches_of(subject.examples, batch)]
            compiled = jax.jit(subject.adapted).lower(*subject.state, *supports[0]).compile()
            candidates[number] = (functools.partial(compiled, *subject.state), supports)
            if batch == max(subject.latency_batches):
                peak = memory.peak_measurement(compiled, batch=batch)
                subject.measurements.append(dataclasses.replace(peak, name="adaptation_memory"))
        repeats = max(subjects[number].repeats for number in candidates)
        for number, latency in measure_interleaved(candidates, repeats=repeats).items():
            of = {"batch": batch}
            kind = subjects[number].clocked
            subjects[number].measurements += [
                measure("adaptation_p50", latency.p50, kind, **of),
                measure("adaptation_p90", latency.p90, kind, **of),
            ]


def decoding(subjects: Sequence[Subject]) -> None:
    """Time of one more token behind the tokens of test examples but the last, for subjects that keep a cache,
    interleaved, at each batch size, and tokens a second at its median. With `decode_length` the sequences have that
    many tokens: test examples are joined, or cut. The cache is donated from call to call, as decoding does it, and
    tokens are written to the same places each time. Where the cost of a step depends on its place (`network.period`),
    a sample is the mean of the steps of the last period."""
    for batch in sorted({size for subject in subjects for size in subject.latency_batches}):
        candidates, lengths, steps = {}, {}, {}
        for number, subject in enumerate(subjects):
            if batch in subject.latency_batches and subject.decodes:
                inputs = _batches_of(subject.examples, batch, subject.decode_length)
                lengths[number] = length = inputs[0][0].shape[1]
                steps[number] = max(min(subject.period, length - 1), 1)
                tokens = [(_last(arrays, steps[number]),) for arrays in inputs]
                candidates[number] = (_Decoder(subject, inputs[0], steps[number]), tokens)
        if not candidates:
            continue
        repeats = max(subjects[number].repeats for number in candidates)
        for number, latency in measure_interleaved(candidates, repeats=repeats).items():
            conditions = {"batch": batch, "length": lengths[number]}
            p50, p90 = (seconds / steps[number] for seconds in (latency.p50, latency.p90))
            kind = subjects[number].clocked
            subjects[number].measurements += [
                measure("decode_p50", p50, kind, **conditions),
                measure("decode_p90", p90, kind, **conditions),
                measure("decode_throughput", batch / p50, kind, **conditions),
            ]


class _Decoder:
    """decoder([(tokens [B, 1], meta [B, 1] where there are meta-tokens), ...]) -> logits of the last: as many steps as
    end where the cache is full."""

    def __init__(self, subject: Subject, inputs: tuple[jax.Array, ...], steps: int):
        # Tokens are numbers [B, T], or vectors [B, T, D].
        def fill(state, tokens, *meta):
            network = subject.merge(subject.graph, state)
            return network.extend(tokens, network.init_cache(*inputs[0].shape[:2]), *meta)[1]

        def step(cache, lengths, state, tokens, *meta):
            cache = _with_lengths(cache, lengths)
            logits, cache = subject.merge(subject.graph, state).extend(tokens, cache, *meta)
            return cache, logits

        self._state = subject.state
        self._cache = jax.jit(fill)(subject.state, *(array[:, :-steps] for array in inputs))
        last = _last(inputs, steps)
        example = (self._cache, _lengths(self._cache), subject.state, *last[0])
        self._step = jax.jit(step, donate_argnums=0).lower(*example).compile()
        self._at = []  # the lengths in front of each step: every cycle begins at the first of them
        for tokens in last:
            self._at.append(jax.tree.map(jnp.copy, _lengths(self._cache)))
            self._cache, _ = self._step(self._cache, self._at[-1], self._state, *tokens)

    def __call__(self, tokens: Sequence[tuple[jax.Array, ...]]) -> jax.Array:
        for lengths, part in zip(self._at, tokens, strict=True):
            self._cache, logits = self._step(self._cache, lengths, self._state, *part)
        return logits


def _last(arrays: tuple[jax.Array, ...], steps: int) -> list[tuple[jax.Array, ...]]:
    """The last columns, one by one."""
    return list(zip(*(jnp.split(array[:, -steps:], steps, 1) for array in arrays), strict=True))


def _lengths(cache: Any) -> list[jax.Array]:
    """How many tokens, or blocks, each part of a cache holds."""
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(cache) if path[-1] == LENGTH]


def _with_lengths(cache: Any, lengths: list[jax.Array]) -> Any:
    given = iter(lengths)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: next(given) if path[-1] == LENGTH else leaf, cache)


LENGTH = jax.tree_util.DictKey("length")


def _given(examples: Sequence[dict]) -> list[str]:
    """The fields that a network is given: inputs, and the places of their meta-tokens or the environments of their
    trajectories where the data has some; of episodes, the support last."""
    names = ("inputs", "meta", "environment", "support_inputs", "support_labels")
    return [name for name in names if name in examples[0]]


def _batches_of(examples: Sequence[dict], batch: int, length: int = 0) -> list[tuple[jax.Array, ...]]:
    """Of each batch what a network is given; with `length`, sequences of so many tokens, made of as many examples in a
    row as it takes."""
    names = _given(examples)
    joined = -(-length // len(examples[0]["inputs"])) if length else 1

    def row(number: int, name: str) -> np.ndarray:
        parts = [examples[i % len(examples)][name] for i in range(number * joined, (number + 1) * joined)]
        return np.concatenate(parts)[:length] if length else parts[0]

    rows = lambda start, name: [row(number, name) for number in range(start * batch, (start + 1) * batch)]
    return [tuple(jnp.asarray(np.stack(rows(start, name))) for name in names) for start in range(ROTATED)]


def floor_rows(
    task: str,
    kind: str,
    train: Sequence[dict],
    test: Sequence[dict],
    info: Mapping[str, Any],
    provenance: Provenance,
    oracle: Callable[..., np.ndarray] | None = None,
) -> list[Row]:
    """The trivial methods of a task, as rows of role "floor"; and as the ceiling, where the data has one, its
    `oracle`: inputs of all test examples -> labels; of trajectories (inputs, environments) -> states; of episodes the
    test source -> what is asked in each."""
    rows = []

    def add(name: str, *measurements: Measurement, role: str = "floor") -> None:
        rows.append(Row(Identity(recipe=name, task=task, variant=name, role=role), provenance, tuple(measurements)))

    if kind == "tokens":
        if info.get("vocab_size") == 256:
            ends = [
                np.concatenate([np.ravel(split[i]["labels"]) for i in range(len(split))]) for split in (train, test)
            ]
            add("unigram", measure("bits_per_byte", floors.unigram_bits_per_byte(*ends), tokens=ends[1].size))
            add("bigram", measure("bits_per_byte", floors.bigram_bits_per_byte(*ends), tokens=ends[1].size))
        elif "chance" in info:
            add("chance", measure("token_accuracy", float(info["chance"]), "modelled"))
        return rows
    if kind == "episode":
        for name, role, values in few_shot.rows(train, test, oracle):
            examples = {"examples": len(test) * len(test[0]["labels"])}
            add(name, *(measure(key, value, **examples) for key, value in values.items()), role=role)
        return rows
    if kind == "set":
        for name, role, values in mixtures.rows(test):
            add(name, *(measure(key, value, examples=len(test)) for key, value in values.items()), role=role)
        return rows
    if kind == "trajectory":
        known, asked = (
            [np.stack([split[i][name] for i in range(len(split))]) for name in ("inputs", "environment")]
            for split in (train, test)
        )
        found = {
            "first state stays": floors.first_state(asked[0]),
            "1-nearest neighbour": floors.nearest_trajectory(*known, *asked),
            **({} if oracle is None else {"true system": oracle(*asked)}),
        }
        for name, states in found.items():
            error = floors.trajectory_error(states, asked[0])
            role = "ceiling" if name == "true system" else "floor"
            add(name, measure("trajectory_error", error, examples=len(asked[0])), role=role)
        return rows
    if kind == "stream":
        for name, found in _stream_floors(test, info["classes"]).items():
            add(name, *found)
        add("chance", *(measure(key, float(info["chance"]), "modelled") for key in POSITIONS))
        return rows
    (x, y), (x_test, y_test) = (_arrays(split) for split in (train, test))
    methods = {"1-nearest neighbour": floors.nearest_neighbour, "linear": floors.linear}
    for name, method in methods.items():
        add(name, measure("accuracy", floors.accuracy(method(x, y, x_test), y_test), examples=len(y_test)))
    if oracle is not None:
        add(
            "oracle", measure("accuracy", floors.accuracy(oracle(x_test), y_test), examples=len(y_test)), role="ceiling"
        )
    return rows


# The accuracies of streams, by which positions they are of.
POSITIONS = {"accuracy": np.s_[:], "first_accuracy": np.s_[:, 0], "last_accuracy": np.s_[:, -1]}


def _stream_floors(test: Sequence[dict], classes: int) -> dict[str, list[Measurement]]:
    """What the earlier examples of each sequence alone tell."""
    x, y = _arrays(test)
    x = x[..., : x.shape[-1] - classes]  # behind them is the label before
    found = {
        "1-nearest neighbour in context": floors.nearest_in_context(x, y),
        "nearest centroid in context": floors.centroid_in_context(x, y, classes),
    }
    return {
        name: [measure(key, floors.accuracy(said[part], y[part]), examples=len(y)) for key, part in POSITIONS.items()]
        for name, said in found.items()
    }


def _arrays(split: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    rows = [split[i] for i in range(len(split))]
    return np.stack([row["inputs"] for row in rows]), np.asarray([row["labels"] for row in rows])
