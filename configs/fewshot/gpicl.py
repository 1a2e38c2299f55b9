"""A decoder that learns to learn: each sequence is a task, and what its labels mean only the sequence itself tells.

Paper: Kirsch et al. 2022, General-Purpose In-Context Learning by Meta-Learning Transformers, arXiv:2212.04458.
Command: uv run train.py --config=configs/fewshot/gpicl.py
Time: 2 to 4 minutes a run on one busy core, of the LSTM 4 to 6; of width 16 one to one and a half.
Result: accuracy on unseen tasks at the last of 32 positions, three seeds: of 4,096 and 65,536 training tasks 97.8 and
97.7 %, on digits 81.3 and 81.1, where the nearest example has 85.0; of 1,024 and 256 it only finds out which seen task
it is (20.2 and 20.3, on seen ones 82.2 and 98.7), and of 16 it has memorised them (99.5 at the first position). The
LSTM goes through the same phases by degrees (33.9 of 1,024), to 71.8 and 52.3 % with seeds far apart. With windows of
2, 4, 8 and 16 positions in the place of all: 51.3, 72.1, 87.7 and 95.3.
results/in_context_phases: uv run scripts/in_context_phases.py --widths=64 --tasks=16,256,1024,4096,65536 --seeds=3 \
    --rates=1e-3,3e-3,1e-2
results/in_context_state: uv run scripts/in_context_phases.py --widths=16,64 --tasks=65536 --seeds=3 \
    --rates=1e-3,3e-3,1e-2 --out=results/in_context_state
results/in_context_windows: uv run scripts/in_context_phases.py --widths=64 --tasks=65536 --seeds=3 \
    --rates=1e-3,3e-3,1e-2 --also="window 2: model.mixer=window model.mixer_kwargs.window.window=2" \
    --also="window 4: ..." --also="window 8: ..." --also="window 16: ..." --out=results/in_context_windows
results/in_context_fixed: uv run scripts/in_context_phases.py --mixers=attention --widths=64 --tasks=65536 --seeds=3 \
    --rates=1e-3 --config.data.kwargs.in_context.fixed_permutation=0.1 --workdir=runs/in_context_fixed \
    --out=results/in_context_fixed
Gaussians in 16 dimensions, 5 classes, 32 examples a sequence. Test sets: unseen tasks, those of training ("seen"), and
unseen tasks of another base set ("other": digits, since Gaussians of other means, projected, are much the same tasks).
first_accuracy and last_accuracy of each say what it is: memorised (no gain within a sequence), identified (a gain on
seen tasks alone) or learned (a gain on unseen tasks too).
The phase plot over the number of tasks, the mixer and the width: scripts/in_context_phases.py.
Sweep: data.kwargs.in_context.tasks=1,16,256,1024,4096,65536 (0: a new one for each sequence)
    model.mixer=attention,lstm,window  model.width=32,64,128  data.batch_size=16,64,256
    data.kwargs.in_context.fixed_permutation=0.0,0.1,0.5
Modes: digits, tasks made of pictures of digits, and Gaussians as the other base set.
"""

from lissom.configs.base import base, mode, tiny


def get_config(arg: str = ""):
    config = base()
    settings = {
        "base": "gaussians",
        "classes": 5,
        "dims": 16,
        "spread": 0.5,
        "length": 32,
        "tasks": 65_536,
        "fixed_permutation": 0.0,
        "test_size": 5000,
    }
    config.data.update({"name": "in_context", "batch_size": 64, "kwargs": {"in_context": settings}})
    config.model.update(
        {
            "name": "in_context",
            "size": "small",
            "mixer": "attention",
            "mixer_kwargs": {"attention": {}, "lstm": {}},
            "ffn": "mlp",
            "ffn_kwargs": {},
            "norm": "layernorm",
            "norm_kwargs": {},
            "learned_positions": 0,
            "dropout": 0.0,
            "stack": None,
            "remat": False,
        }
    )
    config.objective = "in_context"
    config.optim.update({"learning_rate": 1e-3, "weight_decay": 1e-2})
    config.train = {"steps": 3_000}
    other = {"tested": "other", "other_base": "digits"}
    chosen = mode(arg, ("tiny", "digits"))
    if chosen == "digits":
        config.data.kwargs.in_context.update({"base": "digits", "spread": 1.0})
        other = {"tested": "other", "other_base": "gaussians", "spread": 0.5}
    config.evaluation.update({"data": ({"tested": "seen"}, other)})
    if chosen == "tiny":
        config = tiny(config)
        config.data.kwargs.in_context.update({"length": 12, "tasks": 8, "test_size": 50})
    return config
