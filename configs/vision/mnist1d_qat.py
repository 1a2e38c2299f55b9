"""Networks of few bits on MNIST-1D: a small convolutional network, trained in one way or another (modes).

    float       as it is; its rows have it rounded to int8, int4 and int2 without training besides
    others      `configs/few_bits.py` lists them: int8, int4, int2, int4_learned, int2_learned, int4_clipped,
                int4_weights, int2_weights, fp4 and its options, and BiBench's operators (without relu)

Paper: Abdolrashidi et al. 2021, arXiv:2105.03536; Esser et al. 2020, arXiv:1902.08153; Choi et al. 2018,
    arXiv:1805.06085; Hu et al. 2025, arXiv:2509.17791; Qin et al. 2023, arXiv:2301.11233; Greydanus & Kobak 2020,
    arXiv:2011.14439 (the data).
Command: uv run scripts/compare.py --config=configs/vision/mnist1d_qat.py \
    --vary=mode=float,int8,int4,int2,int2_learned --tune=optim.learning_rate=3e-3,1e-2,3e-2 --seeds=3
results/mnist1d_fp4: with --vary=mode=fp4,fp4_rotation,fp4_tensor_scale,fp4_stochastic,fp4_e8m0,fp4_ue5m3,\
    fp4_differentiable,fp4_through_scale,fp4_all,fp4_forward
results/mnist1d_binary: with --vary=mode=bnn,xnor,dorefa,bireal,xnor++,reactnet,recu,fda,irnet,insta,insta_plus \
    --also="float: model.activation=relu" --tune=optim.learning_rate=1e-2,3e-2,9e-2 \
    --config.evaluation.corruptions=gaussian_noise,impulse_noise,blur,contrast,brightness,erase,shift
    and uv run scripts/bibench.py --rows=results/mnist1d_binary/rows.jsonl --out=results/bibench
results/mnist1d_widths: with --vary=mode=float,int8,int4,int2_learned \
    --vary=model.channels="(4,4,4),(8,8,8),(16,16,16),(32,32,32)" --tune=optim.learning_rate=1e-2,3e-2 \
    --cost=bit_operations
results/steps_mnist1d_qat: uv run scripts/training_steps.py --config=configs/vision/mnist1d_qat.py --repeats=100 \
    --vary=mode=float,int8,int4,int4_learned,int2_learned,fp4,fp4_all,bnn,reactnet
Time: half a minute a run on one CPU core, of fp4 three times as long. Result: (results/mnist1d_qat, three seeds) float
    93.5 ± 0.3 %, int8 93.5 ± 1.0, int4 93.4 ± 0.1, int2 63.3 ± 4.6, with learned scales 86.5 ± 0.3; rounded without
    training 93.4, 90.9 and 20.9. (results/mnist1d_fp4) fp4 93.0 ± 0.6, with rotation, tensor scales and random
    rounding 92.4 ± 1.1. (results/mnist1d_widths) int4 of 32 channels 95.3 at the bit operations of float32 of 16.
Sweep: mode=float,int8,int4,int2,int4_learned,int2_learned,int4_clipped,fp4,fp4_all,bnn,reactnet
    model.channels  optim.learning_rate
"""

from lissom.configs import few_bits
from lissom.configs.base import base, mode, tiny

ENDS = "^(convs/0|head)$"


def get_config(arg: str = ""):
    arg = mode(arg, (*few_bits.NAMES, "tiny")) or "float"
    config = base()
    config.data.update({"name": "mnist1d", "batch_size": 100})
    config.model.update({"name": "cnn", "size": "mnist1d", "channels": (16, 16, 16), "kernel": None, "dropout": 0.0})
    config.model.activation = "none" if arg in few_bits.BINARY else "relu"
    config.optim.update({"learning_rate": 1e-2, "weight_decay": 1e-2})
    config.train = {"steps": 2000}
    name, warm_up = ("int4", 1) if arg == "tiny" else (arg, 200)
    few_bits.apply(config, name, ends=ENDS, warm_up=warm_up, signed="ends")
    return tiny(config) if arg == "tiny" else config
