"""BatchNorm folded into the weights in front of it, and that of membrane potentials into thresholds."""

from collections.abc import Iterable

from flax import nnx

from lissom.compression.transforms import Transform
from lissom.models.spiking.layers import SpikingLayer

KINDS = (SpikingLayer,)


class FoldNorms(Transform):
    """The same network without norms, for inference. With a_c = scale_c / sqrt(var_c + epsilon)

        norm(W x)_c = (a_c W_c) x + bias_c - a_c mean_c

    and a neuron behind a norm of its potential (MPBN, Guo et al. 2023, arXiv:2308.08359) has the threshold of
    `membrane_norm.folded_threshold`. Where the norm's scale is negative it fires below, as its mirror image does above:
    of a channel the weights and the bias change their signs, of a single neuron ("element") the current does, at each
    step. What comes out differs by rounding, and spikes where a potential is as near as that to its threshold.

    The layers are those that can fold themselves (`drop_norms`, `take_folded`). UserError where there is no norm.
    """

    def structure(self, module: nnx.Module) -> nnx.Module:
        if not sum(layer.drop_norms() for layer in _layers(module)):
            raise ValueError("there is no norm to fold in a layer that can: those of a spiking network")
        return module

    def values(self, module: nnx.Module, source: nnx.Module, data: Iterable[dict]) -> nnx.Module:
        del data
        for layer, before in zip(_layers(module), _layers(source), strict=True):
            layer.take_folded(before)
        return module


def _layers(module: nnx.Module) -> list:
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, KINDS)]
