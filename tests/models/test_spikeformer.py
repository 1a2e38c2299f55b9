"""Meta-SpikeFormer: the attention by hand, folding, binary operands, what is counted, the network in pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lissom.compression import folding
from lissom.compression.transforms import layer_paths
from lissom.evaluation import costs
from lissom.evaluation.binary_operands import NotSpikeDriven, check_spike_driven
from lissom.evaluation.energy import energy
from lissom.models.norms import BatchNorm
from lissom.models.spiking.spike_attention import attend
from lissom.models.spiking.spike_maps import DepthwiseSeparable, NormedConv, RepConv
from lissom.models.spiking.spikeformer import Spikeformer
from lissom.models.spiking.walk import Walk
from lissom.models.variables import merge, split

TINY = {
    "input_shape": (6, 5, 2),
    "classes": 3,
    "widths": (4, 8),
    "depths": (1, 1),
    "strides": (2, 1),
    "convolutional": 1,
    "heads": 2,
    "stem": 3,
    "kernel": 3,
}


def network(**settings):
    return Spikeformer(**{**TINY, **settings}, rngs=nnx.Rngs(0))


def pictures(count=3):
    """Multiples of 1/16, as the digits are."""
    return jnp.round(jax.random.uniform(jax.random.key(1), (count, 6, 5, 2)) * 16) / 16


def lively(net, *, coarse=False):
    """The network with statistics as after training: scales of either sign, shifts that make its neurons fire.
    `coarse`: all numbers are multiples of 1/8, and var + epsilon = 1, so that float32 sums are exact in any order."""
    keys = iter(jax.random.split(jax.random.key(7), 500))
    drawn = lambda x, low, high: jax.random.uniform(next(keys), x.shape, minval=low, maxval=high)
    grid = (lambda x, unit: jnp.round(x / unit) * unit) if coarse else (lambda x, unit: x)
    for norm in layer_paths(net, (BatchNorm,)).values():
        norm.bias[...] = grid(drawn(norm.bias, 0.2, 1.2), 1 / 8)
        signs = jnp.where(drawn(norm.scale, 0, 1) < 0.3, -1.0, 1.0)
        norm.scale[...] = signs * (2.0 ** jnp.round(drawn(norm.scale, -1, 1)) if coarse else drawn(norm.scale, 0.5, 2))
        norm.mean[...] = grid(drawn(norm.mean, -0.3, 0.3), 1 / 8)
        if coarse:
            norm.epsilon = 0.0
        else:
            norm.var[...] = drawn(norm.var, 0.5, 2)
    if coarse:
        for _, variable in nnx.iter_graph(net):
            if isinstance(variable, nnx.Param) and variable.ndim > 1:
                variable[...] = jnp.clip(grid(variable[...], 1 / 4), -1, 1)
    return net


def fold(net):
    return folding.FoldNorms().structure(net)


def copied(net):
    return merge(split(net))


def activity_of(net, count):
    return np.asarray(nnx.jit(lambda net, x: net(x)[1]["metrics"]["layer_activity"])(net, pictures(count)))


def bits(*rows):
    """[1, 1, N, 1, D] of N tokens in one head."""
    return jnp.array([rows], jnp.float32)[:, None, :, None, :].reshape(1, 1, len(rows), 1, len(rows[0]))


def test_attention_by_hand():
    q, k, v = bits([1, 1], [0, 1], [1, 0]), bits([1, 0], [1, 1], [0, 1]), bits([1, 1], [1, 0], [1, 0])
    seen = []

    def fire(current):
        seen.append(current.reshape(-1, 2).tolist())
        return (current >= 2).astype(jnp.float32)

    told = lambda form, k=k: attend(form, q, k, v, fire)[0, 0, :, 0].tolist()
    # Keys and values meet twice in channel 0, never in channel 1.
    assert told("sdsa1") == [[1, 0], [0, 0], [1, 0]] and seen.pop() == [[2, 0]]
    # Two of three tokens ask in either channel.
    assert told("sdsa2", None) == [[1, 1], [1, 0], [1, 0]] and seen.pop() == [[2, 2]]
    # k^T v = [[1, 1], [0, 0]] + [[1, 0], [1, 0]] + [[0, 0], [1, 0]] = [[2, 1], [2, 0]].
    assert told("sdsa3") == [[1, 0], [1, 0], [1, 0]] and seen.pop() == [[4, 1], [2, 0], [2, 1]]
    assert told("sdsa4") == told("sdsa3")


def test_heads_are_apart():
    q, k, v = (jax.random.bernoulli(jax.random.key(n), 0.5, (2, 3, 5, 2, 4)).astype(jnp.float32) for n in range(3))
    whole = attend("sdsa3", q, k, v, lambda x: x)
    for head in range(2):
        alone = np.einsum("tbnd,tbmd,tbme->tbne", q[..., head, :], k[..., head, :], v[..., head, :])
        np.testing.assert_array_equal(whole[..., head, :], alone)


def test_what_is_folded_into_the_threshold():
    """0.125 Q (K^T V) >= 0.5 where Q (K^T V) >= 4; that of sdsa4 is learned."""
    assert network().stages[1][0].inner.attending.threshold == 4.0 == 0.5 / 0.125
    learned = network(attention="sdsa4").stages[1][0].inner.attending
    np.testing.assert_allclose(learned.limit(), [4.0], rtol=1e-6)
    assert network(attention="sdsa2").stages[1][0].inner.attending.threshold == 0.5
    assert network(attention_threshold=2.5).stages[1][0].inner.attending.threshold == 2.5


FORMS = [{"attention": "sdsa1"}, {"attention": "sdsa4"}, {"attention": "sdsa2", "shortcut": "vanilla"}]
MAPS = {
    "conv": lambda rngs: NormedConv(5, 7, 3, stride=2, rngs=rngs),
    "separable": lambda rngs: DepthwiseSeparable(5, 7, 7, rngs=rngs),
    "rep": lambda rngs: RepConv(5, 7, rngs=rngs),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_is_one_convolution(name):
    layer = lively(nnx.Sequential(MAPS[name](nnx.Rngs(0)))).layers[0]
    x = jax.random.bernoulli(jax.random.key(0), 0.4, (2, 6, 5, 5)).astype(jnp.float32)
    folded = layer.folded()
    np.testing.assert_allclose(folded(x, train=False), layer(x, train=False), rtol=1e-4, atol=1e-5)
    # The border is the inside of a larger grid that is silent around it.
    if folded.stride == 1:
        larger = jnp.pad(x, ((0, 0), (9, 9), (9, 9), (0, 0)))
        np.testing.assert_allclose(
            layer(larger, train=False)[:, 9:-9, 9:-9], layer(x, train=False), rtol=1e-4, atol=1e-5
        )
    assert (folded.inputs, folded.outputs, folded.size) == (layer.inputs, layer.outputs, layer.size)


def spikes_of(net, x, monkeypatch):
    """The spikes of all neurons, in order, and the logits."""
    fire = Walk.fire

    def everything(net, x):
        found = []

        def noted(self, neuron, current):
            found.append(fire(self, neuron, current))
            return found[-1]

        with monkeypatch.context() as patch:
            patch.setattr(Walk, "fire", noted)
            return net(x)[0], found

    logits, found = nnx.jit(everything)(net, x)
    return found, logits


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_a_folded_network_spikes_alike(settings, monkeypatch):
    """On numbers whose sums are exact: elsewhere a potential within rounding of its threshold may go either way."""
    net = lively(network(attention_threshold=2.0, **settings), coarse=True)
    folded = fold(copied(net))
    assert not layer_paths(folded, folding.MAPS)
    before, logits = spikes_of(net, pictures(), monkeypatch)
    after, same = spikes_of(folded, pictures(), monkeypatch)
    rates = [part.mean() for part in before]
    assert len(before) == len(after) == len(net.work()) - 1 and min(rates) > 0 and np.mean(rates) < 0.9
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(logits, same)
    assert [*map(str, net.work())] == [*map(str, folded.work())]


def test_binary_operands():
    whole = lively(network())
    x = pictures(2)
    found = check_spike_driven(fold(copied(whole)).running, x)
    # Of the convolutional stage 4 maps; between 1; of the attention 4 and 2 products, of the channels 2; the head.
    assert len(found) == 4 + 1 + 4 + 2 + 2 + 1
    for form in ("sdsa1", "sdsa2"):
        assert check_spike_driven(fold(lively(network(attention=form))).running, x)
    assert check_spike_driven(fold(lively(network(shortcut="vanilla"))).running, x)
    # Not folded the products within a map see numbers.
    with pytest.raises(NotSpikeDriven, match=r"product 2 \(dot_general of \[8, 3, 3, 8\] and \[8, 4\]\)"):
        check_spike_driven(whole.running, x)
    # Sums of spikes are integers.
    with pytest.raises(NotSpikeDriven, match="has no operand of 0 and 1 alone"):
        check_spike_driven(fold(lively(network(shortcut="spike"))).running, x)
    # What the stem sees is analog.
    with pytest.raises(NotSpikeDriven, match="product 0 "):
        check_spike_driven(fold(copied(whole)).running, x, stem=0)


VARIANTS = {
    "vanilla": {"shortcut": "vanilla", "attention": "sdsa1"},
    "spike": {"shortcut": "spike", "attention": "sdsa4", "encoding": "rate"},
    "normed": {"neuron_kwargs": {"lif": {"membrane_norm": "element"}}},
    "cuba": {"neuron": "cuba", "convolutional": 0, "attention": "sdsa2"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_in_pieces_it_is_the_whole(name):
    net, x = lively(network(time_steps=5, **VARIANTS[name])), pictures()
    encoded, whole = net.encoder(x, net.steps, None), nnx.jit(lambda net, x: net.running(x))(net, x)
    advance = nnx.jit(lambda net, x, steps, carry: net.advance(x, steps, carry)[:2], static_argnums=2)
    carry, parts = net.start(len(x)), []
    for start, steps in ((0, 1), (1, 2), (3, 2)):
        piece = encoded if net.encoder.repeats else encoded[start : start + steps]
        scores, carry = advance(net, piece, steps, carry)
        parts.append(scores)
    np.testing.assert_allclose(jnp.concatenate(parts), whole, atol=1e-5)
    assert np.ptp(whole, axis=0).max() > 0 and np.ptp(whole, axis=1).max() > 0


def test_frames_have_their_own_time():
    net = network(input_shape=(4, 6, 5, 2), encoding="delta", time_steps=0)
    assert net.running(jnp.ones((2, 4, 6, 5, 2))).shape == (4, 2, 3)
    assert net.entries[0].inputs == 4 and net.work()[0].binary


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_what_is_learned_has_gradients(settings):
    net = network(attention_threshold=1.0, **settings)

    def loss(net):
        logits, aux = net(pictures(8), train=True)
        assert aux["metrics"].keys() == {"firing_rate"}
        return jnp.square(logits - 1).sum()

    gradients = nnx.to_flat_state(nnx.jit(nnx.grad(loss))(net))
    assert [path for path, value in gradients if not np.abs(value[...]).max() > 0] == []


def test_shortcuts_by_hand():
    """A branch that gives 0.75 everywhere, and neurons that fire from 1 on."""
    from lissom.models.spiking.neurons import LIF
    from lissom.models.spiking.spikeformer import Branch

    class Constant(nnx.Module):
        def __call__(self, x, walk, binary):
            self.seen = binary, x.tolist()
            walk.row(0, 1, products=1, passes=1, weights=1, inputs=1, outputs=1, binary=True)
            return jnp.full_like(x, 0.75)

    def told(shortcut, x, threshold):
        branch = Branch(Constant(), LIF(1, (), threshold=threshold, rngs=nnx.Rngs(0)), shortcut)
        walk = Walk(1, train=False)
        walk.row(0, 1, products=1, passes=1, weights=1, inputs=1, outputs=1, binary=True)
        return branch(jnp.array([x]), walk)[0].tolist(), branch.inner.seen

    assert told("membrane", [0.5, 1.5], 1.0) == ([1.25, 2.25], (True, [[0, 1]]))
    assert told("vanilla", [0.0, 1.0], 1.0) == ([0, 1], (True, [[0, 1]]))
    assert told("spike", [0.0, 2.0], 0.5) == ([1, 3], (False, [[0, 2]]))


@pytest.mark.parametrize("form", ["sdsa1", "sdsa3"])
def test_work_is_that_of_the_program(form):
    """Of the products; the sums of masks, which the program has no products for, are counted apart."""
    net = fold(network(attention=form, time_steps=3))
    counted = costs.count(net.running, pictures(1)).flops / 2
    work = net.work()
    masks = {"sdsa1": 1, "sdsa2": 1}.get(form, 0) * 3 * (3 * 3 * 8)  # steps, tokens, channels
    assert sum(layer.products for layer in work) == counted + masks
    activity = activity_of(net, 2)
    assert len(activity) == len(work)
    for layer, (spikes, places, _, examples) in zip(work, activity, strict=True):
        assert examples == 2
        assert places == (2 * layer.steps * layer.outputs if layer.states else 0) and spikes <= places
    assert [layer.states for layer in work] == [1] * (len(work) - 1) + [0]
    assert [layer.binary for layer in work] == [False] + [True] * (len(work) - 1)


def test_synaptic_operations_by_brute_force(monkeypatch):
    """With weights of 1 the currents of a map sum up to the operations of its spikes; an attention's by its parts."""
    from lissom.models.spiking import spike_attention

    net, seen, operations = fold(lively(network())), [], []
    plain_map, plain_attend = Walk.map, spike_attention.attend

    def noted_map(self, layer, x, **kinds):
        y = plain_map(self, layer, x, **kinds)
        ones = jnp.ones((layer.size, layer.size, layer.inputs, layer.outputs))
        steps = (x != 0).astype(jnp.float32).reshape(-1, *x.shape[2:])
        names = ("NHWC", "HWIO", "NHWC")
        came = jax.lax.conv_general_dilated(steps, ones, (layer.stride,) * 2, "SAME", dimension_numbers=names)
        operations.append(float(came.sum()))
        return y

    def noted_attend(form, q, k, v, fire):
        seen.append((k[..., :, None] * v[..., None, :]).sum() + q.sum() * q.shape[-1])
        return plain_attend(form, q, k, v, fire)

    monkeypatch.setattr(Walk, "map", noted_map)
    monkeypatch.setattr(spike_attention, "attend", noted_attend)
    activity = net(pictures())[1]["metrics"]["layer_activity"]
    attention = 1 + 4 + 1 + 3  # behind the stem, 4 maps, the next stage's, q, k and v
    assert activity[attention, 2] == pytest.approx(float(seen[0])) and seen[0] > 0
    np.testing.assert_allclose(np.delete(activity[:-1, 2], attention), operations, rtol=1e-6)


def test_energy():
    for settings in ({}, {"attention": "sdsa1"}, {"shortcut": "spike"}):
        net = network(**settings)
        activity = activity_of(lively(net), 3)
        found = energy(net.work(), activity[:, 2] / activity[:, 3])
        assert 0 < found.operations < found.traffic < 1
    integers = [layer.binary for layer in network(shortcut="spike").work()]
    # The stem, the first map of each branch, that of the next stage, q, k, v, the head.
    assert [n for n, binary in enumerate(integers) if not binary] == [0, 1, 3, 5, 6, 7, 8, 11, 13]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"depths": (1,)}, "model.widths (4, 8), model.depths (1,) and model.strides (2, 1) must be as long as each"),
        ({"convolutional": 3}, "model.convolutional=3 must be at least 0 and at most the 2 stages"),
        ({"heads": 3}, "model.heads=3 must divide the width 8 of a stage with attention"),
        ({"kernel": 4}, "model.kernel=4 must be odd"),
        ({"stem": 0}, "model.stem=0 must be at least 1"),
        ({"attention": "sdsa5"}, "model.attention='sdsa5' must be one of sdsa1, sdsa2, sdsa3, sdsa4"),
        ({"attention_threshold": 0.0}, "model.attention_threshold=0.0 must be above 0"),
        ({"shortcut": "none"}, "model.shortcut='none' must be one of membrane, vanilla, spike"),
        (
            {"neuron": "relu", "time_steps": 1},
            "model.neuron='relu' does not spike, and a spikeformer has no dense twin",
        ),
        ({"decoding": "count"}, "model.decoding='count' reads spikes, and the head of a spikeformer has no neurons"),
        ({"input_shape": (9, 2)}, "the model spikeformer reads examples [rows, columns, channels]"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError) as error:
        network(**settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_nothing_to_fold():
    with pytest.raises(ValueError, match="there is no norm to fold"):
        fold(BatchNorm(3, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("form", ["channel", "element"])
def test_norms_of_potentials_are_folded_too(form):
    """Behind a residual stream, so that the signs of channels stay with the neurons."""
    net = lively(network(neuron_kwargs={"lif": {"membrane_norm": form}}))
    folded = fold(copied(net))
    assert not layer_paths(folded, (BatchNorm,)) and layer_paths(net, (BatchNorm,))
    before, after = activity_of(net, 4), activity_of(folded, 4)
    assert 0.05 < before[:, 0].sum() / before[:, 1].sum() < 0.95
    np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(net.running(pictures()), folded.running(pictures()), atol=1e-5)
