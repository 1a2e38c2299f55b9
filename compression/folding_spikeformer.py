"""A spikeformer as it is deployed: each map from spikes to currents one convolution with a bias."""

from flax import nnx

from lissom.compression.transforms import Transform, layer_paths, replace_layers
from lissom.models.spiking.spike_maps import DepthwiseSeparable, NormedConv, RepConv

KINDS = (NormedConv, DepthwiseSeparable, RepConv)


class FoldSpikeformer(Transform):
    """Replaces every map by the convolution that it is in evaluation (`SpikeMap.folded`): norms vanish into kernels and
    biases, the products of a RepConv and of a separable convolution into one dense kernel, which may be larger than
    what it is made of. The attention's scale stands in thresholds from the start."""

    def structure(self, module: nnx.Module) -> nnx.Module:
        return fold(module)


def fold(network: nnx.Module) -> nnx.Module:
    """The network, changed in place. ValueError where it has no maps to fold."""
    if not layer_paths(network, KINDS):
        raise ValueError(f"{type(network).__name__} has no maps of a spikeformer to fold")
    return replace_layers(network, KINDS, lambda path, layer: layer.folded())
