"""Runs reference implementations (torch, transformers, llama.cpp, snnTorch, SpikingJelly) for scripts/benchmark_ops.py
and tests, in an interpreter of their own.

    LISSOM_REFERENCE_PYTHON=/path/to/python uv run scripts/benchmark_ops.py --op=attention

Stands alone: standard library and numpy, and what a case needs; nothing of lissom. benchmark_ops.py starts it and asks
for one call at a time, so that calls here and there alternate. Every request is a line of JSON on stdin, every answer
one on stdout:

    {"do": "hello"}                                      -> {"ok": true, "versions": {...}}
    {"do": "prepare", "label": L, "case": C, "options": {...}, "inputs": [[array, ...], ...]}   -> {"ok": true}
    {"do": "run", "label": L, "number": 3, "calls": 1}   -> {"ok": true, "seconds": 0.0123}     (a call, on average)
    {"do": "outputs", "label": L, "number": 0, "folder": F}                   -> {"ok": true, "outputs": [array, ...]}
    {"do": "drop", "label": L}                           -> {"ok": true}

An array is {"file": a path of a .npy, "dtype": "float32"}; bfloat16 lies in its file as uint16. `inputs` are several
sets of the arguments; call `number` takes set number % len. What cannot be done: {"ok": false, "error": "a sentence"}.
It ends when stdin does.
"""

import json
import os
import pathlib
import sys
import time

import numpy as np

# ---- arrays --------------------------------------------------------------------------------------------------


def load(array):
    """The numpy array of a description; bfloat16 stays uint16."""
    return np.load(array["file"])


def save(value, dtype, file):
    """Writes a numpy array, and describes it."""
    np.save(file, value)
    return {"file": str(file), "dtype": dtype}


def tensor(array, device):
    """A torch tensor of a description."""
    import torch

    value = torch.from_numpy(load(array))
    if array["dtype"] == "bfloat16":
        value = value.view(torch.bfloat16)
    return value.to(device)


def described(value, file):
    """Writes a torch tensor or a numpy array, and describes it."""
    if isinstance(value, np.ndarray):
        return save(value, str(value.dtype), file)
    import torch

    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:
        return save(value.view(torch.uint16).numpy(), "bfloat16", file)
    return save(value.numpy(), str(value.dtype).removeprefix("torch."), file)


# ---- cases -----------------------------------------------------------------------------------------------------
# A case takes (sets of array descriptions, options) and returns (arguments by set, function, device): the function is
# what is timed, on one set's arguments. What it needs to do once (layouts, compilation) it does here.


def numpy_matmul(inputs, options):
    """a @ b."""
    return [tuple(load(a) for a in arrays) for arrays in inputs], lambda a, b: (a @ b,), "cpu"


def torch_matmul(inputs, options):
    """a @ b into a place that is used again: the ceiling of matrix products. int8 gives int32."""
    import torch

    sets = [tuple(tensor(a, options["device"]) for a in arrays) for arrays in inputs]
    a, b = sets[0]
    if a.dtype == torch.int8:
        return sets, lambda a, b: (torch._int_mm(a, b),), options["device"]
    out = a @ b
    return sets, lambda a, b: (torch.matmul(a, b, out=out),), options["device"]


def torch_scale(inputs, options):
    """x *= 0.999: the ceiling of the memory's bandwidth."""
    sets = [tuple(tensor(a, options["device"]) for a in arrays) for arrays in inputs]
    return sets, lambda x: (x.mul_(0.999),), options["device"]


def torch_softmax(inputs, options):
    """softmax over the last axis."""
    import torch

    sets = [tuple(tensor(a, options["device"]) for a in arrays) for arrays in inputs]
    # Into a place that is used again, as our results are: no page fault is timed on either side.
    out = torch.empty_like(sets[0][0])
    return sets, lambda x: (torch.softmax(x, -1, out=out),), options["device"]


def torch_grouped_mm(inputs, options):
    """Rows of x [m, k] in groups, each times its matrix of w [g, k, n]; inputs x, w, sizes, and with options.backward
    the cotangent, when gradients are wanted too. On a GPU torch.nn.functional.grouped_mm, on a CPU (where that is no
    faster than a loop) a product a group, into a place that is used again."""
    import torch
    import torch.nn.functional as F

    device, backward = options["device"], options["backward"]
    sets = []
    for x, w, sizes, *dy in inputs:
        ends = np.cumsum(load(sizes)).astype(np.int32)
        x, w = (tensor(a, device).requires_grad_(backward) for a in (x, w))
        sets.append((x, w, torch.from_numpy(ends).to(device), [tensor(a, device) for a in dy]))

    def by_group(x, w, ends):
        starts = [0, *ends.tolist()[:-1]]
        return torch.cat([x[a:b] @ w[j] for j, (a, b) in enumerate(zip(starts, ends.tolist()))])

    out = None if backward else torch.zeros(sets[0][0].shape[0], sets[0][1].shape[2], dtype=sets[0][0].dtype)

    def run(x, w, ends, dy):
        if device != "cpu":
            y = F.grouped_mm(x, w, offs=ends)
        elif backward:
            y = by_group(x, w, ends)
        else:
            start = 0
            for j, end in enumerate(ends.tolist()):
                torch.matmul(x[start:end], w[j], out=out[start:end])
                start = end
            return (out,)
        return (y, *torch.autograd.grad(y, (x, w), dy[0])) if backward else (y,)

    return sets, run, device


def torch_int_mm(inputs, options):
    """int32 x w^T of int8 x [m, k] and w [n, k]; further inputs (scales) are left."""
    import torch

    sets = [tuple(tensor(a, options["device"]) for a in arrays[:2]) for arrays in inputs]
    return sets, lambda x, w: (torch._int_mm(x, w.t()),), options["device"]


def torch_weight_packed(inputs, options):
    """x [m, k] times the transpose of weights of few bits, in bfloat16, in which torch is fastest by far; inputs x,
    codes [n, k] (int8, or with options.bits = 4 uint8 [n, k / 2], the even number of a byte in its low bits), scale
    [n, g] (g is 1 with 8 bits)."""
    import torch

    device, bits = options["device"], options["bits"]
    sets = []
    for arrays in inputs:
        x, codes, scale = (tensor(a, device) for a in arrays[:3])
        x, scale = x.bfloat16(), scale.bfloat16()
        if bits == 8:
            sets.append((x, codes, scale[:, 0].contiguous()))
            continue
        # Torch counts from -8 up: 0 is -8.
        low, high = (codes & 15) ^ 8, (codes >> 4) ^ 8
        if device == "cpu":
            numbers = torch.stack([low, high], -1).flatten(1).int()
            packed = torch._convert_weight_to_int4pack_for_cpu(numbers, 1)
        else:
            packed = torch._convert_weight_to_int4pack((low << 4) | high, 8)
        sets.append((x, packed, torch.stack([scale.t(), torch.zeros_like(scale.t())], -1).contiguous()))
    if bits == 8:
        return sets, lambda x, w, scale: (torch._weight_int8pack_mm(x, w, scale),), device
    product = torch._weight_int4pack_mm_for_cpu if device == "cpu" else torch._weight_int4pack_mm

    def run(x, w, scale):
        return (product(x, w, x.shape[1] // scale.shape[0], scale),)

    return sets, run, device


def snntorch_leaky(inputs, options):
    """A leaky neuron of snnTorch over the time of currents [t, ...]; with options.backward its gradient too."""
    import snntorch
    from snntorch import surrogate

    neuron = snntorch.Leaky(beta=options["decay"], spike_grad=surrogate.atan(), reset_mechanism="zero")

    def forward(currents):
        membrane, spikes = neuron.init_leaky(), []
        for current in currents:
            spike, membrane = neuron(current, membrane)
            spikes.append(spike)
        return spikes

    return _neuron_over_time(forward, inputs, options)


def spikingjelly_lif(inputs, options):
    """A leaky neuron of SpikingJelly, multi-step, as `snntorch_leaky`."""
    from spikingjelly.activation_based import functional, neuron, surrogate

    layer = neuron.LIFNode(
        tau=1 / (1 - options["decay"]),
        decay_input=False,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
        v_reset=0.0,
        step_mode="m",
    )

    def forward(currents):
        functional.reset_net(layer)
        return layer(currents)

    return _neuron_over_time(forward, inputs, options)


def _neuron_over_time(forward, inputs, options):
    import torch

    device, backward = options["device"], options["backward"]
    sets = [
        tuple(tensor(a, device).requires_grad_(backward and n == 0) for n, a in enumerate(arrays)) for arrays in inputs
    ]

    def run(currents, *cotangent):
        with torch.set_grad_enabled(backward):
            spikes = forward(currents)
            spikes = torch.stack(spikes) if isinstance(spikes, list) else spikes
        return (spikes, *torch.autograd.grad(spikes, currents, cotangent[0])) if backward else (spikes,)

    return sets, run, device


def torch_sdpa(inputs, options):
    """torch.nn.functional.scaled_dot_product_attention.

    options: causal; mask (an array, True where seen; absent: none); backward: whether the last input is the cotangent
    of the result, and gradients are wanted too; heads_major: whether k and v lie as [B, H, S, D] already; first: of the
    inputs so many are taken (absent: all). Inputs and results are [B, T, H, D], as in jax; torch gets [B, H, T, D], its
    own best layout.
    """
    import torch.nn.functional as F

    mask = tensor(options["mask"], options["device"]) if options.get("mask") else None

    def attend(q, k, v):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=options["causal"], enable_gqa=q.shape[1] != k.shape[1]
        )

    return attention(inputs, options, attend)


def torch_flex_attention(inputs, options):
    """torch's flex_attention, compiled, with a block mask. options: as torch_sdpa; window (left, right) for a band."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    left, right = options["window"]
    if left is None and right is None:
        block_mask = None
    else:

        def seen(b, h, q, k):
            low = (k >= q - left) if left is not None else (k >= 0)
            return low & (k <= q + right) if right is not None else low

        q_len, kv_len = (np.load(a["file"], mmap_mode="r").shape[1] for a in inputs[0][:2])
        block_mask = create_block_mask(seen, None, None, q_len, kv_len, device=options["device"])
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q, k, v):
        return compiled(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])

    return attention(inputs, options, attend)


def attention(inputs, options, attend):
    """The parts that all attention cases share: layouts, gradients."""
    import torch

    device, backward = options["device"], options["backward"]
    heads_first = lambda x: x.transpose(1, 2).contiguous()
    sets = []
    for arrays in inputs:
        q, k, v, *cotangent = (tensor(a, device) for a in arrays[: options.get("first")])
        if not options.get("heads_major"):
            k, v = heads_first(k), heads_first(v)
        qkv = tuple(x.requires_grad_(backward) for x in (heads_first(q), k, v))
        sets.append((*qkv, *(heads_first(x) for x in cotangent)))

    def forward(q, k, v):
        with torch.no_grad():
            return (attend(q, k, v).transpose(1, 2),)

    def both(q, k, v, cotangent):
        out = attend(q, k, v)
        gradients = torch.autograd.grad(out, (q, k, v), cotangent)
        return tuple(x.transpose(1, 2) for x in (out, *gradients))

    return sets, both if backward else forward, device


def causal_model(options):
    """The model of transformers that `options` describe, on the CPU in float32: folder, and file for a GGUF in it; or
    random, a config, whose values are drawn and saved in the folder."""
    import torch
    import transformers

    torch.manual_seed(0)
    if options.get("random"):
        settings = dict(options["random"])
        config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, value in model.named_parameters():
                # Norms and biases start at 1 and 0, where a mistake in them is not seen.
                value.copy_(torch.randn(value.shape) * 0.2 + (1.0 if "norm" in name else 0.0))
        model.save_pretrained(options["folder"], max_shard_size=options.get("shard", "1GB"))
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options["folder"], gguf_file=options.get("file"), dtype=torch.float32
        )
    return model.eval()


def transformers_logits(inputs, options):
    """Logits of a causal language model; options: those of `causal_model`; tokens [B, T] -> [B, T, vocabulary]."""
    import torch

    model = causal_model(options)

    def forward(tokens):
        with torch.inference_mode():
            return (model(input_ids=tokens.long()).logits.float(),)

    return [tuple(tensor(a, "cpu") for a in arrays) for arrays in inputs], forward, "cpu"


def transformers_greedy(inputs, options):
    """`count` tokens behind tokens [B, T], each the most likely one -> [B, T + count]; options: count, those of
    `causal_model`."""
    import torch

    model, count = causal_model(options), options["count"]
    model.generation_config.eos_token_id = None  # goes on behind the end

    def generate(tokens):
        with torch.inference_mode():
            mask = torch.ones_like(tokens)
            return (model.generate(tokens.long(), attention_mask=mask, do_sample=False, max_new_tokens=count).int(),)

    return [tuple(tensor(a, "cpu") for a in arrays) for arrays in inputs], generate, "cpu"


def transformers_tokens(inputs, options):
    """Tokens of each of `texts` -> an array a text; options: folder, file, texts."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(options["folder"], gguf_file=options.get("file"))
    encode = lambda text: np.asarray(tokenizer(text)["input_ids"], np.int32)
    return [() for _ in inputs], lambda: tuple(encode(text) for text in options["texts"]), "cpu"


def llama_cpp_tokens(inputs, options):
    """Tokens of each of `texts` by llama.cpp -> an array a text; options: folder, file, texts."""
    import llama_cpp

    path = os.path.join(options["folder"], options["file"])
    model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    encode = lambda text: np.asarray(model.tokenize(text.encode(), add_bos=False, special=True), np.int32)
    return [() for _ in inputs], lambda: tuple(encode(text) for text in options["texts"]), "cpu"


def torch_maml(inputs, options):
    """The gradient of MAML's loss, a mean over tasks, by the initial parameters; inputs support [B, S, ...], its
    labels, queries, theirs, then the parameters. options: network ("mlp": kernels [in, out] and biases; "conv4":
    kernels [3, 3, in, out] behind each of which a normalisation has scale and shift, then the head); inner_steps,
    inner_rate; second_order; vmapped: torch.func over all tasks at once, or a loop over them as learn2learn's examples
    have it."""
    import torch
    import torch.nn.functional as F

    steps, rate, second = options["inner_steps"], options["inner_rate"], options["second_order"]

    def mlp(params, x, statistics):
        for kernel, bias in zip(params[:-2:2], params[1:-2:2]):
            x = torch.relu(x @ kernel + bias)
        return x @ params[-2] + params[-1], None

    def conv4(params, x, statistics):
        """Statistics of a batch are handed on: queries are normalised by the support's."""
        x, found = x.movedim(-1, 1), []
        for layer, (kernel, scale, shift) in enumerate(zip(params[:-2:3], params[1:-2:3], params[2:-2:3])):
            pads = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[:1:-1]]  # as XLA's SAME does it
            x = F.pad(x, [side for pad in pads for side in (pad // 2, pad - pad // 2)])
            x = F.conv2d(x, kernel.movedim((2, 3), (1, 0)), stride=2)
            if statistics is None:
                mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
                found.append((mean, var))
            else:
                mean, var = statistics[layer]
            x = (x - mean[:, None, None]) * torch.rsqrt(var + 1e-5)[:, None, None]
            x = torch.relu(x * scale[:, None, None] + shift[:, None, None])
        return x.movedim(1, -1).flatten(1) @ params[-2] + params[-1], found

    network = {"mlp": mlp, "conv4": conv4}[options["network"]]

    def loss_of(outputs, labels):
        return F.mse_loss(outputs, labels) if labels.dtype == torch.float32 else F.cross_entropy(outputs, labels)

    def task_loss(params, support, targets, queries, labels, gradient):
        adapted = params
        for _ in range(steps):
            slopes = gradient(adapted, support, targets)
            adapted = tuple(p - rate * (g if second else g.detach()) for p, g in zip(adapted, slopes))
        statistics = network(adapted, support, None)[1]
        return loss_of(network(adapted, queries, statistics)[0], labels)

    def autograd(params, x, y):
        return torch.autograd.grad(loss_of(network(params, x, None)[0], y), params, create_graph=second)

    def by_loop(*arrays):
        tasks, params = arrays[:4], arrays[4:]
        losses = [task_loss(params, *task, autograd) for task in zip(*tasks)]
        return torch.autograd.grad(torch.stack(losses).mean(), params)

    def by_vmap(*arrays):
        functional = torch.func.grad(lambda params, x, y: loss_of(network(params, x, None)[0], y))
        each = torch.func.vmap(lambda params, *task: task_loss(params, *task, functional), (None, 0, 0, 0, 0))
        return torch.func.grad(lambda params: each(params, *arrays[:4]).mean())(tuple(arrays[4:]))

    sets = []
    for arrays in inputs:
        given = [tensor(a, options["device"]) for a in arrays]
        given = [x.long() if x.dtype == torch.int32 else x for x in given]
        sets.append((*given[:4], *(x.requires_grad_(not options["vmapped"]) for x in given[4:])))
    return sets, by_vmap if options["vmapped"] else by_loop, options["device"]


CASES = {
    "numpy_matmul": numpy_matmul,
    "torch_matmul": torch_matmul,
    "torch_scale": torch_scale,
    "torch_softmax": torch_softmax,
    "torch_grouped_mm": torch_grouped_mm,
    "torch_int_mm": torch_int_mm,
    "torch_weight_packed": torch_weight_packed,
    "torch_maml": torch_maml,
    "snntorch_leaky": snntorch_leaky,
    "spikingjelly_lif": spikingjelly_lif,
    "torch_sdpa": torch_sdpa,
    "torch_flex_attention": torch_flex_attention,
    "transformers_logits": transformers_logits,
    "transformers_greedy": transformers_greedy,
    "transformers_tokens": transformers_tokens,
    "llama_cpp_tokens": llama_cpp_tokens,
}


# ---- requests ------------------------------------------------------------------------------------------------


def hello(prepared, request):
    """Versions; torch takes as many threads as the program that asks."""
    versions = {"python": sys.version.split()[0], "numpy": np.__version__}
    try:
        import torch
    except ImportError:
        return {"versions": versions, "devices": ["cpu"]}
    torch.set_num_threads(request["threads"])
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {"versions": {**versions, "torch": torch.__version__}, "devices": devices}


def prepare(prepared, request):
    """Loads the inputs, and calls each set once: what is compiled lazily is compiled now."""
    if request["case"] not in CASES:
        raise ValueError(f"no case {request['case']!r}; the cases are {', '.join(CASES)}")
    sets, function, device = CASES[request["case"]](request["inputs"], request["options"])
    prepared[request["label"]] = (sets, function, device)
    for number in range(len(sets)):
        timed(sets, function, device, number, 1)
    return {}


def run(prepared, request):
    """Seconds of a call."""
    return {"seconds": timed(*prepared[request["label"]], request["number"], request["calls"])}


def timed(sets, function, device, number, calls):
    """Seconds of a call: the mean of `calls` in a row."""
    arguments = sets[number % len(sets)]
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        seconds = time.perf_counter() - start
        del result  # freed here, not in the next sample
        return seconds / calls
    import torch

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        function(*arguments)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def outputs(prepared, request):
    """Writes the results of one set."""
    sets, function, _ = prepared[request["label"]]
    folder = pathlib.Path(request["folder"])
    results = function(*sets[request["number"] % len(sets)])
    return {"outputs": [described(r, folder / f"{request['label']}_{i}.npy") for i, r in enumerate(results)]}


def drop(prepared, request):
    """Frees the inputs of a label."""
    prepared.pop(request["label"], None)
    return {}


REQUESTS = {"hello": hello, "prepare": prepare, "run": run, "outputs": outputs, "drop": drop}


def answer(prepared, line):
    """The answer to a line."""
    try:
        request = json.loads(line)
        return {"ok": True, **REQUESTS[request["do"]](prepared, request)}
    except Exception as error:  # whatever a library raises: the other side decides what it means
        return {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def main():
    """Answers until stdin ends."""
    # Answers have a channel of their own: what a library prints must not stand among them.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    prepared = {}
    for line in sys.stdin:
        print(json.dumps(answer(prepared, line)), file=answers, flush=True)


if __name__ == "__main__":
    main()
