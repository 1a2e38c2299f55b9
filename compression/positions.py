"""Other positions for a trained network: rotary angles stretched for longer sequences, none for meta-tokens. As entries
of `config.evaluation.transforms` each is one more row: the same weights, at inference."""

from flax import nnx

from lissom.compression.transforms import Transform, layer_paths
from lissom.models.block_transformer import BlockTransformer
from lissom.models.language import LanguageModel
from lissom.models.linear import Linear
from lissom.models.mixers.attention import Attention
from lissom.models.mixers.latent import LatentAttention
from lissom.models.mixers.meta import MetaTokens
from lissom.models.positions import yarn_factors, yarn_temperature
from lissom.training.errors import UserError


class Yarn(Transform):
    """Rotary angles for sequences `stretch` times as long as the `length` of training, by `yarn_factors` with `slow`
    and `fast`; and where `temperature`, attention's products times `yarn_temperature`, which the weights that make q
    take up (its norm's scale, where it has one). YaRN, Peng et al. 2023, arXiv:2309.00071, without its fine-tuning."""

    def __init__(self, *, stretch: float, length: int, slow: float = 1.0, fast: float = 32.0, temperature: bool = True):
        if stretch < 1 or length < 1 or not 0 <= slow < fast:
            raise UserError(
                f"yarn: stretch={stretch} must be at least 1, length={length} the tokens of a training sequence, and "
                f"slow={slow} below fast={fast}"
            )
        self.stretch, self.length, self.slow, self.fast, self.temperature = stretch, length, slow, fast, temperature

    def structure(self, module: nnx.Module) -> nnx.Module:
        if layer_paths(module, (LatentAttention,)):
            raise UserError("yarn: mla has no rope_factors to stretch")
        if layer_paths(module, (BlockTransformer,)):
            raise UserError("yarn: a block_transformer's positions are those of blocks, and within one: not of tokens")
        for path, layer in _rotary(module).items():
            if layer.rope_factors is not None:
                raise UserError(f"yarn: {path} has rope_factors, its angles are stretched already")
            ours = type(layer).project is Attention.project and isinstance(layer.q, Linear)
            scaled = self.temperature and layer.q_norm is None
            if scaled and ours and not isinstance(layer.q.kernel, nnx.Param):
                raise UserError(
                    f"yarn: {path}/q is quantized already: put yarn in front of that transform, or take "
                    "temperature=False"
                )
            if self.temperature and not ours:
                raise UserError(f"yarn: {path} makes its queries in another way, which temperature=True can't scale")
            layer.rope_factors = yarn_factors(
                layer.rope_dim, self.stretch, self.length, theta=layer.rope_theta, slow=self.slow, fast=self.fast
            )
        return module

    def values(self, module: nnx.Module, source: nnx.Module, data) -> nnx.Module:
        del source, data
        for layer in _rotary(module).values() if self.temperature else ():
            for part in (layer.q.kernel, layer.q.bias) if layer.q_norm is None else (layer.q_norm.scale,):
                if part is not None:
                    part[...] = part[...] * yarn_temperature(self.stretch)
        return module


class ZeroMetaPositions(Transform):
    """Meta-tokens get no position, rotary or learned ("zeroing helps": Shah et al. 2025, arXiv:2509.16278)."""

    def structure(self, module: nnx.Module) -> nnx.Module:
        if layer_paths(module, (BlockTransformer,)):
            raise UserError("zero_meta_positions: a block_transformer takes no meta-tokens")
        layers = [layer for layer in layer_paths(module, (MetaTokens,)).values() if layer.rope_theta]
        learned = [net for net in layer_paths(module, (LanguageModel,)).values() if net.table is not None]
        if not layers and not learned:
            raise UserError(
                "zero_meta_positions: the network has no mixer 'meta_tokens' with rotary angles, and no learned "
                "positions"
            )
        for layer in layers:
            layer.zero_positions = True
        for network in learned:
            network.zero_meta_positions = True
        return module


def _rotary(module: nnx.Module) -> dict[str, Attention]:
    """The layers with rotary angles; without one there is nothing to stretch."""
    found = {path: layer for path, layer in layer_paths(module, (Attention,)).items() if layer.rope_theta}
    if not found:
        raise UserError("yarn: the network has no attention with rotary angles to stretch")
    return found
