"""Norms folded into the weights in front of them, and those of membrane potentials into thresholds."""

from flax import nnx

from lissom.compression.transforms import Transform, layer_paths, replace_layers
from lissom.models.spiking.layers import SpikingLayer
from lissom.models.spiking.neurons import Neuron
from lissom.models.spiking.spike_maps import DepthwiseSeparable, NormedConv, RepConv

MAPS = (NormedConv, DepthwiseSeparable, RepConv)


class FoldNorms(Transform):
    """The same spiking network without norms, for inference. With a_c = scale_c / sqrt(var_c + epsilon)

        norm(W x)_c = (a_c W_c) x + bias_c - a_c mean_c

    and a neuron behind a norm of its potential (MPBN, Guo et al. 2023, arXiv:2308.08359) has the threshold of
    `membrane_norm.folded_threshold`. Where the norm's scale is negative it fires below, as its mirror image does above:
    of a channel the weights and the bias change their signs; of a single neuron ("element"), and where a residual
    stream stands between weights and neurons, the current does, at each step.

    Every map of a spikeformer becomes the one convolution that it is (`SpikeMap.folded`), which may be larger than what
    it is made of.

    What comes out differs by rounding, and spikes where a potential is as near as that to its threshold. UserError
    where there is no norm.
    """

    def structure(self, module: nnx.Module) -> nnx.Module:
        found = len(layer_paths(module, MAPS))
        replace_layers(module, MAPS, lambda _, layer: layer.folded())
        found += sum(layer.fold() for layer in layer_paths(module, (SpikingLayer,)).values())
        # Those of layers have none any more.
        for neuron in layer_paths(module, (Neuron,)).values():
            if neuron.norm is not None:
                neuron.fold(keep_signs=True)
                found += 1
        if not found:
            raise ValueError("there is no norm to fold: it is for those of spiking networks")
        return module
