"""Token mixers: `y, cache, aux = mixer(x[B, T, M], context, cache=None, key=None)`.

With `cache=None` the parallel form runs and None is returned. With a cache, x holds the t next tokens (t = 1 decode,
t > 1 a prefill chunk) and `cache["length"][B]` counts what is stored.
"""

MIXERS = {
    "attention": "lissom.models.mixers.attention:Attention",
    "gqa": "lissom.models.mixers.attention:GroupedQueryAttention",
    "mla": "lissom.models.mixers.latent:LatentAttention",
    "cca": "lissom.models.mixers.compressed:CompressedAttention",
    "ccgqa": "lissom.models.mixers.compressed:CompressedGroupedAttention",
    "window": "lissom.models.mixers.attention:WindowAttention",
    "neighborhood": "lissom.models.mixers.neighborhood:NeighborhoodAttention",
    "bilevel": "lissom.models.mixers.bilevel:BilevelAttention",
    "block_sparse": "lissom.models.mixers.block_sparse:BlockSparseAttention",
    "token_elimination": "lissom.models.mixers.block_sparse:TokenElimination",
    "meta_tokens": "lissom.models.mixers.meta:MetaTokens",
    "lstm": "lissom.models.mixers.lstm:LSTM",
    "none": "lissom.models.mixers.none:NoMixer",
}
