"""The fields that every recipe has. A recipe changes values and adds its model's own fields."""

import ml_collections


def base() -> ml_collections.ConfigDict:
    """One training run; see docs/architecture.md for the fields."""
    config = ml_collections.ConfigDict()
    config.recipe = ""
    config.seed = 0
    config.data = {
        "name": "",
        "data_dir": "",
        "batch_size": 128,
        "augment": (),
        "order": "shuffled",  # or "by_class": the classes one after the other
        "classes_per_task": 1,  # by class: how many are learned at a time,
        "task_steps": 0,  # for how many steps; 0: one pass over their examples
        "replay": 0.0,  # by class: share of a batch that comes from a memory of earlier classes,
        "replay_size": 0,  # which holds so many examples of each
        "meta_tokens": "none",  # or "random", "pauses": where they stand
        "meta_fraction": 0.1,  # of the tokens, for "random"
        "kwargs": {},
    }
    config.model = {"name": "", "size": "", "dtype": "float32"}
    config.objective = "classification"
    config.objective_kwargs = ml_collections.ConfigDict()
    config.transforms = ()
    config.optim = {
        "name": "adamw",
        "optim_kwargs": {},
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup": 0.05,  # fraction of the run
        "final_fraction": 0.0,  # of the learning rate, at the end of the schedule
        "weight_decay": 1e-4,
        "decay": r"(kernel|table)$",  # parameters that decay, by path
        "clip_norm": 1.0,  # 0 switches it off
        "accumulate": 1,  # micro-batches a step
    }
    config.train = {}  # exactly one of steps, epochs, examples
    config.stages = ()
    config.init_from = ()  # directories of finished runs, pretrained:NAME_OR_PATH; several are averaged
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1, "sequence": 1, "expert": 1}
    config.checkpoint = {"every": 0, "keep": 2}  # steps; 0: at the end only
    config.log = {"every": 20}
    config.evaluation = {
        "every": 0,  # steps; 0: at the end only
        "batch_size": 500,
        "transforms": (),  # each is one more row
        "data": (),  # settings of the dataset; each is one more test set
        "corruptions": (),  # names of lissom.data.corruptions; each at each severity is one more test set
        "severities": (1, 2, 3, 4, 5),
        "latency_batches": (1, 64),
        "latency_repeats": 30,
        "decode_length": 0,  # tokens of a sequence whose last one is timed; 0: as many as the test examples have
        "floor": True,  # the trivial method's row
        "baselines": (),  # variants that compare.py adds to every table, as its --also has them
    }
    return config


def decoder(**changes) -> dict:
    """The fields of `config.model` for a `language` model of a recipe's own mixers, sizes and feed-forwards."""
    fields = {
        "name": "language",
        "size": "small",
        "mixer": "attention",
        "mixer_kwargs": {"attention": {}},
        "ffn": "swiglu",
        "ffn_kwargs": {},
        "norm": "rmsnorm",
        "norm_kwargs": {},
        "tied": True,
        "embedding_multiplier": None,
        "learned_positions": 0,
        "dropout": 0.0,
        "stack": None,
        "remat": False,
    }
    return fields | changes


def stepwise(**changes) -> dict:
    """The fields of `config.model` for a network that goes through examples step by step, with spiking neurons."""
    fields = {
        "size": "small",
        "neuron": "lif",
        "neuron_kwargs": {
            "if": {},
            "lif": {"decay": 0.5, "threshold": 1.0, "learn_threshold": False, "membrane_norm": "none"},
        },
        "encoding": "direct",
        "encoding_kwargs": {},
        "decoding": "mean",
        "decoding_kwargs": {},
        "time_steps": 4,
    }
    return fields | changes


def tiny(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """What every recipe's `tiny` mode shares: three steps of the smallest model, in seconds."""
    config.model.size = "tiny"
    with config.unlocked():
        config.train = {"steps": 3}
    config.data.batch_size = 16
    config.log.every = 1
    config.evaluation.update({"batch_size": 64, "latency_batches": (1,), "latency_repeats": 3, "floor": False})
    return config


def mode(arg: str, known: tuple[str, ...]) -> str:
    """The mode of a recipe; an unknown one is an error that lists them."""
    arg = arg or ""
    if arg not in ("", *known):
        raise ValueError(f"unknown mode {arg!r}: known are {', '.join(known)}")
    return arg
