"""Shape letters, once for the whole repository.

| letter | axis                                   | letter | axis                             |
|--------|----------------------------------------|--------|----------------------------------|
| B      | batch                                  | M      | model width                      |
| T      | tokens: query length                   | F      | hidden width of a feed-forward   |
| S      | keys: key and value length             | V      | vocabulary                       |
| H      | query heads                            | C      | channels or classes              |
| K      | key and value heads (H = K x group)    | E      | experts                          |
| D      | head dimension                         | L      | layers                           |

Logical axes name what a parameter's dimension *is*; `training/sharding.py` maps them to mesh axes.
"""

# The mesh axes that split the batch; the rest of the mesh is the affair of training/sharding.py.
BATCH = ("data", "fsdp", "expert")

LOGICAL_AXES = (
    "layers",
    "embed",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "vocab",
    "classes",
    "spatial",
    "channels",
    "positions",
    "norm",
    "experts",
    "batch",
    "length",
)
