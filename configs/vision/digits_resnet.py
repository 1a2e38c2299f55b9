"""A small residual network with BatchNorm on scikit-learn's handwritten digits.

A mode of `configs/few_bits.py` trains it for few bits (float: measured as rounded without training); for signs it has
no relu.

Paper: He et al. 2015, arXiv:1512.03385.
Command: uv run train.py --config=configs/vision/digits_resnet.py
Time: about a minute on 2 CPU cores. Result: (MNIST-1D, results/mnist1d_allocation, three seeds) 98.7 %; rounded to int4
    without training 91.0 ± 1.3, with bits chosen layer by layer within as many bytes 97.7 ± 0.2. (5,000 pictures of
    MNIST, results/mnist5k_few_bits) float 97.1 ± 0.3 %, trained with int4 97.0 ± 0.1, int2 90.3 ± 7.7, signs with
    thresholds of each instance 94.6 ± 0.4.
results/mnist1d_allocation: uv run scripts/compare.py --config=configs/vision/digits_resnet.py \
    --config.data.name=mnist1d --config.data.batch_size=100 --tune=optim.learning_rate=1.7e-3,5e-3,1.5e-2 --seeds=3
    and uv run scripts/allocate_bits.py --run='runs/compare/digits_resnet/recipe_seed*' --activations=weights \
    --method=uniform,random,hessian,divergence,distilled,inter_layer --bytes=14000,18072,24000
results/mnist1d_allocation_tuned: of the same runs, with --method=uniform,random,hessian,divergence,distilled \
    --bytes=14000,18072 --fine_tune=200 --fine_tune_rate=1
results/mnist1d_calibration: of the same runs, uv run scripts/allocate_bits.py \
    --run='runs/compare/digits_resnet/recipe_seed*' --activations=weights --batches=2 --method=uniform,distilled \
    --ranges=training,distilled,noise --bytes=18072,31976
results/mnist1d_bisection: of the same runs, uv run scripts/allocate_bits.py \
    --run='runs/compare/digits_resnet/recipe_seed*' --activations=int8 --options=int2,int8 \
    --method=random,hessian,divergence,inter_layer --accuracy=0.9,0.97,0.99
results/mnist1d_resnet_widths: uv run scripts/compare.py --config=configs/vision/digits_resnet.py \
    --config.data.name=mnist1d --config.data.batch_size=100 --vary=mode=float,int8,int4,int2_learned \
    --vary=model.widths="(4,8,16),(8,16,32),(16,32,64)" --tune=optim.learning_rate=5e-3,1.5e-2 --seeds=3 \
    --cost=bit_operations
results/mnist5k_few_bits: uv run scripts/compare.py --config=configs/vision/digits_resnet.py \
    --config.data.name=mnist5k --config.train.epochs=6 \
    --vary=mode=float,int8,int4,int2,fp4,bnn,reactnet,insta,insta_plus \
    --tune=optim.learning_rate=5e-3,1.5e-2 --seeds=3 (when the first and the last layer had unsigned activations)
    and measured again by uv run eval.py --runs='runs/compare/digits_resnet/mode=*' (rows named by their modes by hand)
results/steps_digits_resnet: uv run scripts/training_steps.py --config=configs/vision/digits_resnet.py --repeats=15 \
    --config.data.name=mnist5k --vary=mode=float,int8,int4,int2_learned,fp4,bnn,reactnet,insta
Sweep: model.size=tiny,small,20  optim.learning_rate
"""

from lissom.configs import few_bits
from lissom.configs.base import base, mode, tiny

ENDS = "^(stem|head)$"


def get_config(arg: str = ""):
    arg = mode(arg, (*few_bits.NAMES, "tiny"))
    config = base()
    config.data.update({"name": "digits", "batch_size": 128})
    config.model.update({"name": "resnet", "size": "small", "activation": "none" if arg in few_bits.BINARY else "relu"})
    config.optim.update({"learning_rate": 5e-3, "weight_decay": 1e-2})
    config.train = {"epochs": 30}
    config.evaluation.update({"transforms": ({"name": "int8_weights"},)})
    if arg in few_bits.NAMES:
        # Pictures are not below 0, but other data are, which a first layer of unsigned activations would clip.
        few_bits.apply(config, arg, ends=ENDS, warm_up=60, signed="ends")
    return tiny(config) if arg == "tiny" else config
