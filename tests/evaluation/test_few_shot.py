"""The floors of episodes, on hand-made ones; adaptation is timed apart from answering."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from lissom.evaluation import few_shot, measuring


def episode(support, support_labels, inputs, labels):
    found = {"support_inputs": support, "support_labels": support_labels, "inputs": inputs, "labels": labels}
    whole = np.issubdtype(np.asarray(labels).dtype, np.integer)
    return {n: np.asarray(v, np.int32 if "labels" in n and whole else np.float32) for n, v in found.items()}


def classes(seed, count=40):
    """Classes differ along the first axis, and examples of one class mostly along the second."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        means = np.array([[-1.0, 0.0], [1.0, 0.0]]) + rng.normal(0, 0.2, (2, 2))
        draw = lambda each, means=means: np.repeat(means, each, 0) + rng.normal(0, 1, (2 * each, 2)) * [0.3, 6.0]
        found.append(episode(draw(2), np.repeat([0, 1], 2), draw(10), np.repeat([0, 1], 10)))
    return found


def test_discriminants_ignore_what_does_not_tell_classes():
    """Divided by the deviation within classes, the axis that is noise is small."""
    known, asked = classes(0), classes(1)
    whitening = few_shot.within_class_whitening(known)
    narrow, wide = np.sqrt(np.diag(np.linalg.inv(whitening @ whitening)))
    assert (
        0.3 < narrow < 0.5 and 5.5 < wide < 6.5
    )  # 0.3 and 6, the first of which the estimate shrinks towards the other
    rows = {name: values["accuracy"] for name, _, values in few_shot.rows(known, asked)}
    plain, better = rows["nearest centroid on inputs"], rows["nearest centroid, linear discriminants"]
    assert better > 0.9 > 0.8 > plain
    on_inputs = ("nearest centroid", "k-means", "logistic regression")
    assert set(rows) == {*(f"{name} on inputs" for name in on_inputs), "nearest centroid, linear discriminants"}


def test_rows_by_hand():
    """Supports at 0 and 10: queries at 1 and 9 are right, 6 of class 0 is wrong: 2 of 3."""
    one = episode([[0.0], [10.0]], [0, 1], [[1.0], [9.0], [6.0]], [0, 1, 0])
    found = few_shot.rows([one], [one, one], lambda test: [np.array([0, 1, 0])] * len(test))
    rows = {name: (role, values) for name, role, values in found}
    assert rows["nearest centroid on inputs"] == ("floor", {"accuracy": 2 / 3})
    assert rows["logistic regression on inputs"] == ("floor", {"accuracy": 2 / 3})  # parts them at 5, too
    assert rows["all examples of the classes, nearest neighbour"] == ("ceiling", {"accuracy": 1.0})


def test_interval_over_episodes():
    right = episode([[0.0], [10.0]], [0, 1], [[1.0]], [0])
    wrong = episode([[0.0], [10.0]], [0, 1], [[1.0]], [1])
    rows = few_shot.rows([right], [right] * 450 + [wrong] * 150)
    values = {name: told for name, _, told in rows}["nearest centroid on inputs"]
    expected = 1.96 * np.sqrt(0.75 * 0.25 / 599)
    np.testing.assert_allclose((values["accuracy"], values["accuracy_interval"]), (0.75, expected), rtol=1e-5)


def test_regression_by_hand():
    task = episode([[0.0], [2.0]], [[1.0], [3.0]], [[0.5], [9.0]], [[2.0], [3.0]])
    found = {name: values["mse"] for name, _, values in few_shot.rows([task], [task])}
    # The mean is 2: errors 0 and 1. The nearest says 1 and 3: errors 1 and 0.
    np.testing.assert_allclose(found["mean of the support"], 0.5)
    np.testing.assert_allclose(found["nearest of the support"], 0.5)


def test_kernel_ridge_goes_through_the_support_and_back_to_its_mean():
    x = np.array([[-1.0], [0.0], [1.5]])
    task = episode(x, [[2.0], [-1.0], [5.0]], x, [[0.0]] * 3)
    np.testing.assert_allclose(few_shot.kernel_ridge(task, 0.5, 1e-8), task["support_labels"], atol=1e-4)
    far = {**task, "inputs": np.array([[100.0]])}
    np.testing.assert_allclose(few_shot.kernel_ridge(far, 0.5, 1e-8), [[2.0]], atol=1e-6)
    # One example of weight k / (k + ridge): half of its distance from the mean, which is its own value.
    single = episode([[0.0], [9.0]], [[4.0], [0.0]], [[0.0]], [[0.0]])
    np.testing.assert_allclose(few_shot.kernel_ridge(single, 0.5, 1.0), [[2.0 + 0.5 * 2.0]], atol=1e-6)


def test_adaptation_is_timed_and_its_memory_known():
    """An adaptation that makes a matrix of 1000 x 1000 of each support needs at least that."""
    seen = []

    def adaptation(network, *, support_inputs, support_labels):
        seen.append((support_inputs.shape, support_labels.shape))
        return network * jnp.einsum("bsi,bsj->bij", support_inputs, support_inputs)

    rng = np.random.default_rng(0)
    examples = [episode(rng.normal(size=(3, 1000)), [0, 1, 1], rng.normal(size=(2, 1000)), [0, 1]) for _ in range(8)]
    fields = {field.name: None for field in dataclasses.fields(measuring.Subject)}
    given = {"merge": lambda graph, state: state[0], "adaptation": adaptation, "examples": examples}
    given |= {"state": (jnp.ones(()), {}, {}), "latency_batches": (1, 2), "repeats": 4, "simulated": False}
    subject, other = (
        measuring.Subject(**fields | given | {"measurements": [], "adaptation": how}) for how in (adaptation, None)
    )
    measuring.adapting([other, subject])
    assert {shapes[0][0] for shapes in seen} == {1, 2} and other.measurements == []
    values = {(m.name, m.conditions["batch"]): m.value for m in subject.measurements}
    assert values["adaptation_memory", 2] >= 2 * 4e6 and ("adaptation_memory", 1) not in values
    assert 0 < values["adaptation_p50", 1] <= values["adaptation_p90", 1]
