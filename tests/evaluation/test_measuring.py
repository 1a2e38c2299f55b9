"""Latency, memory and trivial methods."""

import dataclasses
import gc
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.evaluation import floors, latency, measuring, memory


def test_calls_alternate_inputs_rotate_and_nothing_is_collected():
    calls = []

    def recorder(name):
        return lambda x: calls.append((name, x, gc.isenabled()))

    inputs = [(0,), (1,), (2,)]
    latency.measure_interleaved({"a": (recorder("a"), inputs), "b": (recorder("b"), inputs)}, repeats=4, warmup=1)
    timed = calls[6:]  # each of three inputs once for a, once for b
    assert [name for name, _, _ in timed] == ["a", "b"] * 4
    assert [x for name, x, _ in timed if name == "a"] == [0, 1, 2, 0]
    assert not any(enabled for _, _, enabled in timed) and gc.isenabled()


def test_the_slow_one_is_slower_and_making_inputs_is_not_timed():
    def fresh(_):
        time.sleep(0.02)
        return (0,)

    inputs = [(0,), (1,)]
    found = latency.measure_interleaved(
        {"slow": (lambda x: time.sleep(0.01), inputs), "fast": (lambda x: x, fresh)}, repeats=5, warmup=1
    )
    assert found["slow"].p50 >= 0.01 and found["fast"].p50 < 0.01
    assert len(found["slow"].samples) == 5


def test_donated_inputs_are_fresh_each_call():
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    shapes = (jax.ShapeDtypeStruct((8,), jnp.float32),)
    make = lambda number: latency.iid_inputs(shapes, 1, seed=number)[0]
    found = latency.measure_interleaved({"add": (add, make)}, repeats=3, warmup=1)
    assert found["add"].p90 >= found["add"].p50 > 0
    used = make(0)
    add(*used)
    assert used[0].is_deleted()


def test_percentiles_and_throughput_by_hand():
    # 1..11: median 6, 90th percentile 10.
    found = latency.summarize_samples([float(i) for i in range(1, 12)])
    assert (found.p50, found.p90) == (6.0, 10.0)
    values = {m.name: m for m in latency.latency_measurements(found, 12)}
    assert values["throughput"].value == 2.0 and values["throughput"].conditions == {"batch": 12}


def test_bad_inputs_are_refused():
    one, other = (np.zeros(2),), (np.zeros(3),)
    with pytest.raises(ValueError, match="at least 2 argument tuples"):
        latency.measure_interleaved({"a": (lambda x: x, [one])})
    with pytest.raises(ValueError, match="input 1 has other shapes"):
        latency.measure_interleaved({"a": (lambda x: x, [one, other])})


def test_decoding_takes_the_steps_of_a_period_in_turn():
    """A network whose every third token writes to another place: each call is the three steps that fill the cache."""

    class Network:
        period = 3

        def init_cache(self, batch, length):
            return {"seen": jnp.zeros((batch, length), jnp.int32), "inner": {"length": jnp.zeros(batch, jnp.int32)}}

        def extend(self, tokens, cache):
            at = cache["inner"]["length"][0]
            if tokens.shape[1] > 1:
                return tokens, {"seen": cache["seen"], "inner": {"length": cache["inner"]["length"] + tokens.shape[1]}}
            seen = jax.lax.dynamic_update_slice(
                cache["seen"], jax.lax.dynamic_slice(cache["seen"], (0, at), (2, 1)) + 1, (0, at)
            )
            return seen, {"seen": seen, "inner": {"length": cache["inner"]["length"] + 1}}

    fields = {field.name: None for field in dataclasses.fields(measuring.Subject)}
    examples = [{"inputs": np.arange(8, dtype=np.int32)}]
    given = {"merge": lambda *_: Network(), "examples": examples, "latency_batches": (2,), "repeats": 4}
    subject = measuring.Subject(**fields | given | {"measurements": []})
    assert subject.decodes and subject.period == 3
    decoder = measuring._Decoder(subject, (jnp.zeros((2, 8), jnp.int32),), 3)
    for calls in (1, 2):
        seen = decoder([(jnp.zeros((2, 1), jnp.int32),)] * 3)
        assert seen.tolist() == [[0] * 5 + [calls + 1] * 3] * 2
    measuring.decoding([subject])
    found = {m.name: m for m in subject.measurements}
    assert list(found) == ["decode_p50", "decode_p90", "decode_throughput"]
    assert found["decode_throughput"].value == 2 / found["decode_p50"].value
    assert found["decode_p50"].conditions == {"batch": 2, "length": 8}
    for length in (20, 5):
        longer = dataclasses.replace(subject, decode_length=length, measurements=[])
        measuring.decoding([longer])
        assert [m.conditions["length"] for m in longer.measurements] == [length] * 3


def test_decoding_of_vectors():
    """A network of inputs [B, t, D]: the cache is for as many sequences and tokens, and D is none of its business."""

    class Network:
        def init_cache(self, batch, length):
            return {"sum": jnp.zeros((batch, 3)), "length": jnp.zeros(batch, jnp.int32), "room": jnp.zeros(length)}

        def extend(self, inputs, cache):
            total = cache["sum"] + inputs.sum(1)
            return total[:, None], {**cache, "sum": total, "length": cache["length"] + inputs.shape[1]}

    fields = {field.name: None for field in dataclasses.fields(measuring.Subject)}
    examples = [{"inputs": np.full((5, 3), number, np.float32), "labels": np.zeros(5, np.int32)} for number in range(6)]
    given = {"merge": lambda *_: Network(), "examples": examples, "latency_batches": (2,), "repeats": 3}
    subject = measuring.Subject(**fields | given | {"measurements": []})
    decoder = measuring._Decoder(subject, (jnp.ones((2, 5, 3)),), 1)
    # Filled with four ones, and one more while it was compiled; then two.
    assert decoder([(2 * jnp.ones((2, 1, 3)),)]).tolist() == [[[7.0] * 3]] * 2
    measuring.decoding([subject])
    found = {m.name: m.conditions for m in subject.measurements}
    assert found["decode_p50"] == {"batch": 2, "length": 5}


def test_sequences_to_decode_are_examples_joined_or_cut():
    examples = [{"inputs": np.arange(3) + 10 * number} for number in range(5)]
    inputs = lambda length: [batch[0].tolist() for batch in measuring._batches_of(examples, 2, length)]
    assert inputs(0)[:2] == [[[0, 1, 2], [10, 11, 12]], [[20, 21, 22], [30, 31, 32]]]
    assert inputs(2)[0] == [[0, 1], [10, 11]]
    # Two examples a row, four a batch, and behind the last of the five comes the first.
    assert inputs(5)[:2] == [[[0, 1, 2, 10, 11], [20, 21, 22, 30, 31]], [[40, 41, 42, 0, 1], [10, 11, 12, 20, 21]]]


def test_iid_inputs_are_independent_and_as_asked():
    shapes = {
        "x": jax.ShapeDtypeStruct((4000,), jnp.bfloat16),
        "tokens": jax.ShapeDtypeStruct((4000,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((4000,), jnp.bool_),
    }
    first, second = latency.iid_inputs(shapes, 2, integers_below=10)
    assert first["x"].dtype == jnp.bfloat16
    a, b = np.asarray(first["x"], np.float32), np.asarray(second["x"], np.float32)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.1 and 0.9 < a.std() < 1.1
    assert set(np.unique(first["tokens"])) == set(range(10))
    assert 0.4 < np.mean(first["mask"]) < 0.6


def test_compiled_memory_by_hand():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    plain = memory.compiled_memory(jax.jit(lambda x: x + 1).lower(x).compile())
    donated = memory.compiled_memory(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile())
    array = 4 * 256 * 256
    # One array in, one out, and no temporary; donated, the one is written into the other.
    assert plain.peak == 2 * array and donated.peak == array
    assert memory.peak_measurement(jax.jit(lambda x: x + 1).lower(x).compile(), batch=256).kind == "compiled"


def test_parameter_bytes_count_bits():
    tree = {
        "int4": jax.ShapeDtypeStruct((3, 5), jnp.int4),  # 15 * 4 bits = 7.5 bytes, so 8
        "bool": jax.ShapeDtypeStruct((3,), jnp.bool_),  # 3
        "bf16": jax.ShapeDtypeStruct((2, 2), jnp.bfloat16),  # 8
        "f8": jax.ShapeDtypeStruct((5,), jnp.float8_e4m3fn),  # 5
        "c64": jax.ShapeDtypeStruct((1,), jnp.complex64),  # 8
        "scalar": jnp.float32(1),  # 4
    }
    assert memory.parameter_bytes(tree) == 8 + 3 + 8 + 5 + 8 + 4
    assert memory.parameter_count(tree) == 15 + 3 + 4 + 5 + 1 + 1
    with pytest.raises(ValueError, match="random key"):
        memory.parameter_bytes(jax.random.key(0))


def test_artefact_bytes(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"123")
    assert memory.artefact_bytes(tmp_path) == 8
    with pytest.raises(FileNotFoundError):
        memory.artefact_bytes(tmp_path / "nowhere")


PEAK = """
import time

import numpy as np

from lissom.evaluation import memory

samples = []


class Counted(memory.psutil.Process):
    def memory_info(self):
        samples.append(super().memory_info())
        return samples[-1]


memory.psutil.Process = Counted


def work():
    block = np.ones(8 << 20)  # 64 MiB of float64, touched
    # A busy machine may not run the sampling thread for a while: two whole samples are waited for.
    seen, deadline = len(samples), time.monotonic() + 60
    while len(samples) < seen + 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    return float(block[0])


print(*memory.process_peak(work))
"""


def test_process_peak_sees_memory_that_is_gone_afterwards():
    """In a fresh process, as its docstring says: this one gives back what other tests left while it runs."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    result, risen = done.stdout.split()
    assert float(result) == 1.0 and (50 << 20) < int(risen) < (200 << 20)


def test_floors_on_points_with_known_answers():
    train, labels = np.array([[0.0, 0], [0, 1], [10, 10], [10, 11], [9, 9]]), np.array([0, 0, 1, 1, 1])
    test = np.array([[1.0, 0], [8, 8]])
    assert floors.nearest_neighbour(train, labels, test).tolist() == [0, 1]
    assert floors.linear(train, labels, test).tolist() == [0, 1]
    assert floors.majority_class(labels, 3).tolist() == [1, 1, 1]
    assert floors.accuracy([1, 1, 0, 0], [1, 0, 0, 0]) == 0.75
    with pytest.raises(ValueError, match="do not match"):
        floors.accuracy([1, 1], [1])


def test_floors_of_trajectories_with_known_answers():
    # Two environments: in the first the trajectory from 1 stays and that from 3 grows; the second has one that falls.
    train = np.array([[[1.0], [1.0]], [[3.0], [4.0]], [[1.0], [0.0]]])
    test = np.array([[[1.5], [1.5]], [[2.5], [3.0]], [[1.4], [0.0]]])
    nearest = floors.nearest_trajectory(train, np.array([0, 0, 1]), test, np.array([0, 0, 1]))
    assert nearest[:, 1, 0].tolist() == [1.0, 4.0, 0.0]
    # Behind the first state: (0.5^2 + 1^2 + 0) / 3, and (0 + 0.5^2 + 1.4^2) / 3 where nothing moves.
    assert floors.trajectory_error(nearest, test) == pytest.approx(1.25 / 3)
    assert floors.trajectory_error(floors.first_state(test), test) == pytest.approx((0.25 + 1.96) / 3)
    with pytest.raises(ValueError, match="environment 2 has no training trajectory"):
        floors.nearest_trajectory(train, np.array([0, 0, 1]), test, np.array([0, 0, 2]))
    with pytest.raises(ValueError, match="do not match"):
        floors.trajectory_error(test[:2], test)


def test_floors_of_streams_by_hand():
    """Points on a line: 0, 10, 1, 4, 6, 12 of classes 1, 0, 1, 2, 0, 2."""
    x, labels = np.array([[0.0, 10, 1, 4, 6, 12]])[..., None], np.array([[1, 0, 1, 2, 0, 2]])
    # Nearest before: none; 0; 0; 1; 4 (not 10); 10.
    assert floors.nearest_in_context(x, labels).tolist() == [[0, 1, 1, 1, 2, 0]]
    # Means before: none; 1 at 0; also 0 at 10; 1 at 0.5; also 2 at 4; 0 at 8, 1 at 0.5, 2 at 4.
    assert floors.centroid_in_context(x, labels, 4).tolist() == [[0, 1, 1, 1, 2, 0]]
    # 4 is nearer to 6 than to -3, and nearer to the mean of -3 and 7 (class 1) than to 6.
    x, labels = np.array([[-3.0, 6, 9, 4]])[..., None], np.array([[1, 0, 1, 1]])
    assert floors.nearest_in_context(x, labels).tolist() == [[0, 1, 0, 0]]
    assert floors.centroid_in_context(x, labels, 2).tolist() == [[0, 1, 0, 1]]
    two = floors.nearest_in_context(np.concatenate([x, x]), np.concatenate([labels, 1 - labels]))
    assert two.tolist() == [[0, 1, 0, 0], [0, 0, 1, 1]]  # each by its own labels


def test_floors_of_streams_do_not_read_the_label_that_stands_behind():
    """Features all alike, so that the nearest is the first; the one-hot labels before would tell otherwise."""
    labels = np.array([1, 0, 0, 1, 0])
    inputs = np.zeros((5, 1 + 2), np.float32)
    inputs[1:, 1:] = labels[:-1, None] == np.arange(2)
    test = [{"inputs": inputs, "labels": labels}] * 3
    rows = measuring.floor_rows("task", "stream", None, test, {"classes": 2, "chance": 0.5}, None)
    found = {row.identity.variant: {m.name: m.value for m in row.measurements} for row in rows}
    # Said: 0 at first, then always 1: of 1, 0, 0, 1, 0 one is right.
    nearest = {"accuracy": 0.2, "first_accuracy": 0.0, "last_accuracy": 0.0}
    assert found["1-nearest neighbour in context"] == pytest.approx(nearest)
    assert found["chance"] == {"accuracy": 0.5, "first_accuracy": 0.5, "last_accuracy": 0.5}
    assert {row.identity.role for row in rows} == {"floor"}


def test_bits_per_byte_by_hand():
    # Symbols 0, 0, 1, 0 of 2: p(0) = (3 + 1) / (4 + 2) = 2/3, p(1) = 1/3.
    train = np.array([0, 0, 1, 0])
    assert floors.unigram_bits_per_byte(train, np.array([0, 1]), 2) == pytest.approx(-np.log2(2 / 3 * 1 / 3) / 2)
    # After 0 came 0 and 1 once each: p(1 | 0) = (1 + 1/3) / (2 + 1) = 4/9. After 1 came 0: p(1 | 1) = (1/3) / 2.
    expected = -np.log2(4 / 9 * 1 / 6) / 2
    assert floors.bigram_bits_per_byte(train, np.array([0, 1, 1]), 2) == pytest.approx(expected)
    with pytest.raises(ValueError, match="two test symbols"):
        floors.bigram_bits_per_byte(train, np.array([0]), 2)
    with pytest.raises(ValueError, match="integers in"):
        floors.unigram_bits_per_byte(train, np.array([2]), 2)
