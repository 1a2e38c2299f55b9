"""Few-shot classification of letters whose scripts no training task had.

`beclr` learns from single images of the training scripts, without their labels; `data.batch_size` counts these then.

Paper: Finn et al. 2017, MAML, arXiv:1703.03400; Snell et al. 2017, arXiv:1703.05175; and the objectives' docstrings.
Command: uv run scripts/compare.py --config=configs/fewshot/glyphs.py --vary=objective=maml,fomaml,anil,reptile,protonet
    uv run train.py --config=configs/fewshot/glyphs.py --config.objective=beclr --config.data.batch_size=256
Time: 20 s (reptile) to 4 minutes (imaml) and 6 (beclr) a run on one busy core.
Result: 5 ways, 1 shot, 1,000 steps, three seeds: supervised features, which forget the episodes, 94.0 % and protonet
93.7; meta_sgd 90.9, anil 89.8, maml 87.9, fomaml 84.6, reptile 73.6; imaml 91.1, 90.8 and, in the third seed, 43.8;
beclr, which has no labels, 66.5; nearest centroid on the pixels 54.4. But for beclr's features, class means are worse
than k-means over the queries, and k-means than transported means (supervised: 95.1, 98.1, 98.9). The best rates of
supervised, protonet and fomaml are the largest tried, reptile's the smallest.
results/fewshot_glyphs: uv run scripts/compare.py --config=configs/fewshot/glyphs.py \
    --vary=objective=maml,fomaml,anil,reptile,protonet,meta_sgd,imaml \
    --also="beclr: objective=beclr data.batch_size=256" --tune=optim.learning_rate=3e-3,1e-2,3e-2
results/fewshot_glyphs_5: the same with --config.data.kwargs.episodes.shots=5 and, since the recipe's own baseline
    counts the images of its own shots, --config.evaluation.baselines="('supervised features: objective=supervised
    objective_kwargs.supervised.single=True data.batch_size=400',)"
results/transductive: uv run scripts/transductive.py --out=results/transductive \
    --runs="runs/compare/glyphs/objective=protonet_seed*,runs/compare/glyphs/supervised_features_seed*,\
    runs/compare/glyphs/objective=maml_seed*,runs/compare/glyphs/beclr_seed*"
results/beclr_memory: uv run scripts/compare.py --config=configs/fewshot/glyphs.py --config.objective=beclr \
    --config.data.batch_size=256 --config.optim.learning_rate=1e-2 "--config.evaluation.baselines=()" \
    --vary=objective=beclr --also="whole memory: objective_kwargs.beclr.clusters=0" \
    --also="no neighbours: objective_kwargs.beclr.neighbours=0" \
    --also="untrained: optim.learning_rate=1e-9 train.steps=100"
results/steps_fewshot_glyphs: uv run scripts/training_steps.py --config=configs/fewshot/glyphs.py \
    --config.data.batch_size=1 --repeats=5 --also="fomaml, 5 steps: objective=fomaml" \
    --also="maml, 20 steps, tree: objective=maml objective_kwargs.maml.inner_steps=20 objective_kwargs.maml.remat=tree"
    and so on, of 5, 20 and 80 steps, and of none, step and tree
Sweep: objective=maml,fomaml,anil,reptile,meta_sgd,imaml,protonet,supervised  data.kwargs.episodes.shots=1,5
    objective_kwargs.maml.inner_steps=1,3,5  objective_kwargs.maml.remat=none,step,tree
    objective_kwargs.maml.statistics=support,queries,running
    evaluation.data=({'support_candidates':10},{'query_concentration':2.0})
    objective=beclr: objective_kwargs.beclr.neighbours=0,5  objective_kwargs.beclr.clusters=0,100
    objective_kwargs.beclr.uniformity=0.0,0.1  objective_kwargs.beclr.strength=0.5,1.0
"""

from lissom.configs.base import base, mode, tiny

SINGLE = "objective_kwargs.supervised.single"
HELD_OUT = ("georgian", "armenian", "hebrew", "lisu", "lao", "old_italic")


def get_config(arg: str = ""):
    config = base()
    letters = {"test_scripts": HELD_OUT, "classes": None, "size": 20, "train_size": 51_200, "test_size": 26_000}
    episodes = {
        "source": "glyphs",
        "source_kwargs": letters,
        "ways": 5,
        "shots": 1,
        "queries": 15,
        "support_candidates": 0,
        "query_concentration": 0.0,
        "test_size": 1_000,
    }
    config.data.update({"name": "episodes", "batch_size": 4, "kwargs": {"episodes": episodes}})
    config.model.update({"name": "cnn", "size": "conv4", "batch_norm": True, "dropout": 0.0, "activation": "relu"})
    config.objective = "maml"
    config.objective_kwargs = {
        "maml": {"inner_rate": 0.1, "inner_steps": 5, "remat": "none", "statistics": "support"},
        "fomaml": {"inner_rate": 0.1, "inner_steps": 5, "statistics": "support"},
        "anil": {"inner_rate": 0.1, "inner_steps": 5, "remat": "none", "statistics": "support"},
        "meta_sgd": {"inner_rate": 0.1, "inner_steps": 1, "remat": "none", "statistics": "support"},
        "imaml": {"inner_rate": 0.1, "inner_steps": 10, "proximity": 0.5, "solver_steps": 5, "statistics": "support"},
        "reptile": {"inner_rate": 0.1, "inner_steps": 5, "inner_batch": 10, "statistics": "support"},
        "protonet": {"statistics": "running"},
        "supervised": {"statistics": "running"},
        # The paper's 40 rows a cluster, and its warm-up of 15 % of the run.
        "beclr": {"memory": 4096, "clusters": 100, "neighbours": 5, "warm_up": 150, "momentum": 0.995}
        | {"uniformity": 0.1, "width": 128, "strength": 1.0, "statistics": "running"},
    }
    config.optim.learning_rate = 3e-3
    config.train = {"steps": 1000}
    config.log.every = 100
    config.evaluation.update({"batch_size": 20, "latency_batches": (1, 8)})
    if mode(arg, ("tiny",)):
        config = tiny(config)
        config.data.batch_size = 8
        config.data.kwargs.episodes.update({"queries": 2, "test_size": 6})
        config.data.kwargs.episodes.source_kwargs.update({"size": 16, "train_size": 240, "test_size": 60, "classes": 8})
        config.evaluation.batch_size = 4
        config.objective_kwargs.maml.inner_steps = 2
        # Full in the second step, in partitions and searched in the third.
        small = {"memory": 24, "clusters": 3, "neighbours": 2, "warm_up": 2, "width": 16}
        config.objective_kwargs.beclr.update(small)
    tasks = config.data.kwargs.episodes
    images = config.data.batch_size * tasks.ways * (tasks.shots + tasks.queries)  # as many a step as the episodes have
    baseline = f"supervised features: objective=supervised {SINGLE}=True data.batch_size={images}"
    config.evaluation.baselines = (baseline,)
    return config
