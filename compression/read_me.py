"""The transform that carves a dense decoder into experts (Read-ME, Cai et al. 2024, arXiv:2410.19123)."""

from collections.abc import Iterable
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lissom.compression.channels import copy_channels, recorded
from lissom.compression.transforms import Transform, layer_paths, replace_layers
from lissom.models.ffn import SwiGLU
from lissom.models.language import LanguageModel
from lissom.models.read_me import Carved, PreGated, Router
from lissom.training.errors import UserError


class ReadMe(Transform):
    """Every gated feed-forward layer of H channels becomes `experts` of round(share x H) channels, one a domain:

        a_dh      mean of |activation| of channel h over the tokens of domain d, over their sum over h
        common    the round(common x H) channels with the largest min_d a_dh: every token has them
        expert d  of the others, those with the largest a_dh

    and one router for all layers, a causal transformer of `depth` layers of `width` on the embedded tokens. Data:
    `batches` batches of sequences whose domains are known.

    The paper's always-on channels are those in which all experts' halves agree, so that the data decides how many; the
    shape of a network follows from settings here, hence their share is one. The network's values draw the router.
    """

    def __init__(
        self,
        *,
        experts: int,
        share: float = 0.5,
        common: float = 0.25,
        width: int = 32,
        depth: int = 1,
        heads: int = 2,
        batches: int = 8,
    ):
        self.experts, self.share, self.common, self.batches = experts, share, common, batches
        self.router = {"width": width, "depth": depth, "heads": heads}
        if experts < 1 or batches < 1:
            raise UserError(f"read_me: experts and batches must be at least 1, got {experts}, {batches}")
        if not 0 < common < share <= 1:
            raise UserError(f"read_me: common={common} must be above 0 and below share={share}, which is at most 1")

    def structure(self, module: nnx.Module) -> nnx.Module:
        if not isinstance(module, LanguageModel):
            raise UserError(f"read_me is for the network 'language', not for {type(module).__name__}")
        layers = layer_paths(module, (SwiGLU,))
        if len(layers) < len(module.blocks):
            raise UserError("read_me carves gated feed-forward layers: every layer needs ffn='swiglu'")
        rngs = nnx.Rngs(0)  # for shapes: `values` fills everything

        def carved(path: str, layer: SwiGLU) -> Carved:
            width, channels = layer.up.kernel.shape
            common, active = round(self.common * channels), round(self.share * channels)
            if not 0 < common < active:
                raise UserError(f"read_me: of {channels} channels of {path}, {common} would be common, {active} active")
            return Carved(
                width,
                channels=channels,
                common=common,
                hidden=active - common,
                experts=self.experts,
                rate=layer.dropout,
                dtype=layer.up.dtype,
                rngs=rngs,
            )

        network = replace_layers(module, (SwiGLU,), carved)
        return PreGated(network, self._router(network, rngs))

    def values(self, module: nnx.Module, source: nnx.Module, data: Iterable[dict]) -> nnx.Module:
        dense = layer_paths(source, (SwiGLU,))
        activity = self._activity(source, data)
        for number, (path, old) in enumerate(dense.items()):
            _carve(layer_paths(module.network, (Carved,))[path], old, activity[number])
        # Networks of other seeds get other routers.
        bits = np.asarray(source.embed.table[...], np.float32).view(np.uint32)
        module.router = self._router(source, nnx.Rngs(int(bits.sum(dtype=np.uint64) % 2**31)))
        return module

    def _router(self, network: LanguageModel, rngs: nnx.Rngs) -> Router:
        width = network.embed.table.shape[1]
        return Router(width, self.experts, **self.router, dtype=network.dtype, rngs=rngs)

    def _activity(self, source: nnx.Module, data: Iterable[dict]) -> jax.Array:
        """a [layers, D, H] of the module's docstring."""
        run = recorded(source, mean=True)
        total = None
        for batch in islice(data, self.batches):
            if "domains" not in batch:
                raise UserError("read_me needs data that names domains, such as 'domain_text'")
            found = batch["domains"].shape[-1]
            if found != self.experts:
                raise UserError(f"read_me: there must be an expert for each of the data's {found} domains")
            activity = jnp.stack([told["activity"] for told in run(batch["inputs"]).values()])
            of_batch = jnp.einsum("bd,lbh->ldh", batch["domains"], activity)
            total = of_batch if total is None else total + of_batch
        if total is None:
            raise UserError("read_me looks at data to tell the channels apart, and there is none here")
        return total / jnp.maximum(total.sum(-1, keepdims=True), 1e-30)


def _carve(new: Carved, old: SwiGLU, activity: jax.Array) -> None:
    """Copies the channels that `activity` [D, H] chooses."""
    count, hidden = new.common_channels.shape[0], new.channels.shape[1]
    common = jax.lax.top_k(activity.min(0), count)[1]
    rest = activity.at[:, common].set(-1.0)
    own = jax.lax.top_k(rest, hidden)[1]
    gate, up, down = (layer.kernel[...] for layer in (old.gate, old.up, old.down))
    new.gate.kernel[...], new.up.kernel[...], new.down.kernel[...] = gate[:, common], up[:, common], down[common]
    copy_channels(new.experts, old, own)
    new.common_channels[...], new.channels[...] = common.astype(jnp.int32), own.astype(jnp.int32)
