"""The names a measurement may carry: one visible dict with unit, direction and meaning."""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One thing that is measured.

    `unit` is the unit in which rows store it ("1" is a pure number, "fraction" lies in 0..1), `direction`
    says which way is better (None: neither), `machine` on which hardware the number depends: that which was
    "measuring", that which was "training", or none ("").
    """

    unit: str
    direction: str | None
    meaning: str
    machine: str = ""


METRICS = {
    # What the model is worth.
    "accuracy": Metric("fraction", "higher", "test examples (of streams: their positions) whose class is predicted"),
    "first_accuracy": Metric("fraction", "higher", "streams whose first label is predicted"),
    "last_accuracy": Metric("fraction", "higher", "streams whose last label is predicted"),
    "token_accuracy": Metric("fraction", "higher", "masked-in test tokens that are predicted"),
    "accuracy_gain": Metric("fraction", "higher", "accuracy less that of class means of the same features"),
    "accuracy_interval": Metric("fraction", "lower", "half width of the 95 % interval of accuracy over test episodes"),
    "mse": Metric("1", "lower", "mean squared error of the targets of the queries of test episodes"),
    "mse_interval": Metric("1", "lower", "half width of the 95 % interval of mse over test episodes"),
    "prototype_accuracy": Metric("fraction", "higher", "accuracy of the nearest class mean of the same features"),
    "kmeans_accuracy": Metric("fraction", "higher", "the same of k-means over all queries, from these means on"),
    "laplacian_accuracy": Metric("fraction", "higher", "the same of Laplacian-regularised prototypes"),
    "transported_accuracy": Metric("fraction", "higher", "the same of means that transport moves to the queries"),
    "corruption_accuracy": Metric("fraction", "higher", "accuracy, mean over corrupted test sets"),
    "loss": Metric("nats", "lower", "mean cross-entropy of a test example, token or element of a set"),
    "bits_per_byte": Metric("bits", "lower", "cross-entropy a byte of test text"),
    "density": Metric("fraction", "lower", "attention scores that are computed, of those its mask allows"),
    "excess_loss": Metric("nats", "lower", "loss, less that of dense attention, or of the dense network"),
    "mass_recall": Metric("fraction", "higher", "attention mass on the scores that are computed, mean over rows"),
    "output_error": Metric("fraction", "lower", "norm of the output's error / norm of dense attention's output"),
    "kept": Metric("fraction", "lower", "tokens that a layer's mixer computes"),
    "load_entropy": Metric("fraction", "higher", "entropy of the experts' shares of the choices / log of their number"),
    "max_load": Metric("1", "lower", "choices of the most chosen expert / mean of all experts"),
    "domain_information": Metric("bits", None, "mutual information of domain and expert of a token, mean over layers"),
    "dropped": Metric("fraction", "lower", "choices of an expert that has no room for them"),
    "untaken": Metric("fraction", "lower", "tokens that no expert takes"),
    "left_out": Metric("fraction", "lower", "weight of the experts that a token is not brought to at inference"),
    "hit_rate": Metric("fraction", "higher", "requests for an expert that find it in the cache"),
    "router_agreement": Metric("fraction", "higher", "bricks that a router names, of those of most activity"),
    "coactive": Metric("fraction", "higher", "co-activation of channels that lies within bricks"),
    "specialisation": Metric("fraction", None, "channels that tell a domain best, in the brick of most of them"),
    "specialisation_drawn": Metric("fraction", None, "the same of partitions that are drawn"),
    "specialisation_excess": Metric("1", None, "the difference, in standard deviations of those that are drawn"),
    "logit_error": Metric("1", "lower", "largest difference of an output from the network's in front of the transform"),
    "log_likelihood": Metric("nats", "higher", "mean log-likelihood of an element of a test set"),
    "likelihood_gap": Metric("nats", "lower", "log-likelihood under what a set was drawn from, less that predicted"),
    "mean_steps": Metric("1", "lower", "time steps that a test example takes until it is answered, mean"),
    "threshold": Metric("fraction", None, "confidence above which an example stops early"),
    "temperature": Metric("1", None, "what scores are divided by in front of the softmax that says how sure they are"),
    "calibration_error": Metric(
        "fraction", "lower", "|accuracy - confidence| of 15 bins of confidence, all steps together"
    ),
    "agreement": Metric("fraction", "higher", "examples that the program stops and answers as its scores say"),
    "adjusted_rand": Metric("1", "higher", "adjusted Rand index of likeliest and true components, mean over test sets"),
    "trajectory_error": Metric("1", "lower", "mean squared error of the states of test trajectories behind the first"),
    "purity": Metric("fraction", "higher", "test examples of the family or cluster that their expert has most of"),
    "trial_loss": Metric("fraction", "lower", "test error of the chosen of n random trials / variance, expected"),
    "skipped_updates": Metric("fraction", "lower", "updates of the gate that found no clusters and were skipped"),
    "forgetting": Metric(
        "fraction",
        "lower",
        "best accuracy on a task while classes were learned, less the last; mean over earlier tasks",
    ),
    "rmse": Metric("1", "lower", "root mean square error of the predictions of test targets, in their unit"),
    # Of the laws of quantization-aware training (qat_law.py).
    "share_law_a": Metric("1", None, "a of the best share exp(-a / ln S), S tokens per byte"),
    "share_law_error": Metric("fraction", "lower", "root mean square error of the best shares by that law"),
    "law_error": Metric("fraction", "lower", "|loss by a law - loss| / loss, mean over runs"),
    # Of a binary network beside the full-precision one (bibench.py).
    "relative_accuracy": Metric("1", "higher", "accuracy / that of the full-precision network"),
    "relative_corruption_accuracy": Metric("1", "higher", "the same, root mean square over corrupted test sets"),
    "bibench_score": Metric("1", "higher", "root mean square of relative accuracies"),
    "relative_train_seconds": Metric("1", "lower", "train_seconds / those of the other network", machine="training"),
    "compression_ratio": Metric("1", "higher", "bytes of the full-precision network / of this one"),
    "train_loss": Metric("nats", "lower", "loss at the last logged training step"),
    # What learning it costs.
    "train_seconds": Metric("s", "lower", "wall time of all training steps, compilation apart", machine="training"),
    "compile_seconds": Metric("s", "lower", "wall time of tracing and compiling", machine="training"),
    "examples_per_second": Metric("1/s", "higher", "training examples a second, compilation apart", machine="training"),
    "step_p50": Metric("s", "lower", "median time of one training step, warm", machine="measuring"),
    "train_steps": Metric("1", None, "optimizer steps taken"),
    "train_tokens": Metric("1", None, "tokens of the training text seen, repeats counted"),
    "qat_share": Metric("fraction", None, "of them, those of quantization-aware training"),
    "tokens_per_byte": Metric("1", None, "tokens seen / bytes of the parameters as they are stored"),
    "train_examples": Metric("1", None, "training examples seen, repeats counted"),
    "train_flops": Metric("FLOP", "lower", "products and convolutions of the whole training"),
    "train_peak_memory": Metric("B", "lower", "peak memory of one training step", machine="training"),
    "train_temporaries": Metric("B", "lower", "of that, what is neither argument nor result", machine="training"),
    "steps_to_loss": Metric("1", "lower", "steps to the first evaluation whose loss is that of another variant's last"),
    "gradient_variance": Metric("1", "lower", "trace of the covariance of a batch's gradient / |its mean| squared"),
    "gradient_bias": Metric("1", "lower", "|mean of the estimates - gradient| / |gradient|"),
    "gradient_noise": Metric("1", "lower", "root mean square of |estimate - gradient| / |gradient|"),
    "allocation_seconds": Metric("s", "lower", "time in which bits were allotted to layers", machine="measuring"),
    "calibration_seconds": Metric("s", "lower", "time in which activations were measured", machine="measuring"),
    "allocation_passes": Metric("1", "lower", "passes over the examples by which bits were allotted to layers"),
    # What using it costs.
    "latency_p50": Metric("s", "lower", "median time of one call, warm", machine="measuring"),
    "latency_p90": Metric("s", "lower", "90th percentile of the time of one call, warm", machine="measuring"),
    "adaptation_p50": Metric("s", "lower", "median time of adapting to a task's support, warm", machine="measuring"),
    "adaptation_p90": Metric("s", "lower", "90th percentile of the time of adapting, warm", machine="measuring"),
    "adaptation_memory": Metric("B", "lower", "arguments, results and temporaries of adapting", machine="measuring"),
    "throughput": Metric("1/s", "higher", "examples a second at the median latency", machine="measuring"),
    "peak_memory": Metric("B", "lower", "arguments, outputs and temporaries of one call", machine="measuring"),
    "energy": Metric("J", "lower", "energy of one example", machine="measuring"),
    "firing_rate": Metric("fraction", "lower", "spikes a neuron and step, mean over all neurons"),
    "synaptic_operations": Metric("1", "lower", "outputs that the spikes of one example go to, counted"),
    "inference_energy": Metric("J", "lower", "operations and memory traffic of one example x published energies"),
    "operation_energy": Metric("J", "lower", "the same of its operations alone"),
    "flops": Metric("FLOP", "lower", "products and convolutions of one example's forward pass"),
    "bit_operations": Metric(
        "1", "lower", "multiply-adds of dense layers, convolutions and experts x bits of the wider operand"
    ),
    "rounding_operations": Metric("1", "lower", "operations of rounding in one training step of this batch"),
    "decode_p50": Metric("s", "lower", "median time of one more token of each sequence, warm", machine="measuring"),
    "decode_p90": Metric("s", "lower", "90th percentile of the time of one more token, warm", machine="measuring"),
    "decode_throughput": Metric(
        "1/s", "higher", "tokens a second of all sequences at the median time of one more", machine="measuring"
    ),
    "cache_bytes": Metric("B", "lower", "cache of one sequence of this many tokens"),
    "cache_bytes_per_token": Metric("B", "lower", "cache that one more token of one sequence needs"),
    # What an op reaches on a machine (scripts/benchmark_ops.py).
    "latency_spread": Metric("fraction", "lower", "interquartile range / median of the samples", machine="measuring"),
    "flop_rate": Metric("FLOP/s", "higher", "operations that the problem needs / median time", machine="measuring"),
    "limit": Metric("s", None, "least time that the ceilings of the run allow", machine="measuring"),
    "efficiency": Metric("fraction", "higher", "limit / median time", machine="measuring"),
    "speedup": Metric("1", "higher", "median time of the reference / ours, taken in turns", machine="measuring"),
    "memory_walks": Metric("1", "lower", "reads and writes of all of the data in main memory"),
    "growth_exponent": Metric(
        "1", "lower", "log(time / time at the next smaller size) / log(size / size)", machine="measuring"
    ),
    # What a machine can do at most, as a run measured it first.
    "bandwidth": Metric("B/s", "higher", "bytes read and written a second, in streams", machine="measuring"),
    "matmul_rate": Metric("FLOP/s", "higher", "square matrix product of normal data", machine="measuring"),
    "exp_rate": Metric("1/s", "higher", "exponentials a second, float32", machine="measuring"),
    "fma_rate": Metric("FLOP/s", "higher", "multiply-adds of float32 outside of matrix units", machine="measuring"),
    "dispatch_seconds": Metric("s", "lower", "shortest call of a compiled function", machine="measuring"),
    # How large it is.
    "parameters": Metric("1", "lower", "scalars in the parameters"),
    "parameter_bytes": Metric("B", "lower", "bits of the parameters' dtypes / 8"),
    # Orbax packs equal weights into 10 kB more or less from one save to the next.
    "artefact_bytes": Metric("B", "lower", "size of the exported directory on disk, its container included"),
}


# What a network is worth, the first that rows have before the others: the metrics whose difference to the first variant
# is shown.
QUALITIES = (
    *("accuracy", "token_accuracy", "bits_per_byte", "log_likelihood", "trajectory_error", "mse", "loss"),
    "corruption_accuracy",
)

# What objectives say of a test set, and not layers of themselves: what further test sets have.
JUDGED = (
    *QUALITIES,
    *("first_accuracy", "last_accuracy", "likelihood_gap", "adjusted_rand", "accuracy_interval", "mse_interval"),
    *("prototype_accuracy", "kmeans_accuracy", "laplacian_accuracy", "transported_accuracy"),
)


def metric(name: str) -> Metric:
    """The entry of `METRICS`; an unknown name is a ValueError that names the nearest."""
    if name in METRICS:
        return METRICS[name]
    near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
    raise ValueError(f"no metric is called {name!r}; the nearest is {near!r} (all: {', '.join(METRICS)})")
