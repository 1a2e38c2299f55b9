"""Few-shot regression: sinusoids of new amplitudes and phases, from ten points each.

Paper: Finn et al. 2017, MAML, arXiv:1703.03400, section 5.1.
Command: uv run scripts/compare.py --config=configs/fewshot/sinusoid.py \
    --vary=objective=maml,fomaml,anil,reptile,protonet
Time: 20 seconds to one and a half minutes a run on one busy core (adaptation to ten points: 0.2 ms).
Result: mean squared error of 1,000 new sinusoids, three seeds, each at its best of five rates: maml 0.070, reptile
0.105, fomaml 0.160, anil 0.180, meta_sgd (one inner step) 0.237; protonet (a mean of the targets, weighted by distance)
1.61; one network for all tasks, fine-tuned, 1.92; imaml drifts off (19, 4e4, 1e10), and at a rate of 3e-3 has 0.32.
Kernel ridge regression without any meta-learning has 0.220 +- 0.063 over tasks; the mean of the ten targets 4.63.
results/fewshot_sinusoid: uv run scripts/compare.py --config=configs/fewshot/sinusoid.py \
    --vary=objective=maml,fomaml,anil,reptile,meta_sgd,protonet,imaml \
    --also="imaml at 3e-3: objective=imaml optim.learning_rate=3e-3" \
    --tune=optim.learning_rate=1e-3,3e-3,1e-2,3e-2,1e-1 --cost=adaptation_p50
Sweep: objective=maml,fomaml,anil,reptile,meta_sgd,imaml,protonet,supervised
    data.kwargs.regression_tasks.families=sinusoid,ramp,('sinusoid','ramp'),('duffing','van_der_pol')
    data.kwargs.regression_tasks.shots=5,10,20  data.kwargs.regression_tasks.noise=0.0,0.3
    objective_kwargs.maml.inner_steps=1,5,10  objective_kwargs.maml.inner=sgd,adamw
"""

from lissom.configs import meta_learners
from lissom.configs.base import base, mode, tiny


def get_config(arg: str = ""):
    config = base()
    tasks = {"families": ("sinusoid",), "shots": 10, "queries": 20, "noise": 0.0, "test_size": 1_000}
    config.data.update({"name": "regression_tasks", "batch_size": 25, "kwargs": {"regression_tasks": tasks}})
    inner = {"inner": "sgd", "inner_rate": 0.01, "inner_steps": 5}
    meta_learners.apply(config, inner=inner, implicit={"inner": "adamw", "inner_rate": 0.03})
    config.optim.learning_rate = 1e-2
    config.train = {"steps": 5_000}
    if mode(arg, ("tiny",)):
        config = tiny(config)
        config.data.batch_size = 8
        config.data.kwargs.regression_tasks.test_size = 20
    return config
