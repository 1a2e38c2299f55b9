"""Checkpoints against transformers, an independent implementation in an interpreter of its own.

export LISSOM_REFERENCE_PYTHON=...    a Python with torch, transformers, gguf, accelerate and llama_cpp
uv run --extra pretrained pytest -n 0 -m slow -rP tests/models/test_pretrained_reference.py
"""

import copy
import functools
import inspect
import os
import pathlib
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lissom.compression.grouped_to_latent import GroupedToLatent
from lissom.evaluation import memory
from lissom.evaluation.benchmarks.worker import VARIABLE, ReferenceWorker, WorkerError
from lissom.models.pretrained import CheckpointError, load, packaged
from lissom.models.variables import Parts, merge, split

ROOT = pathlib.Path(__file__).parent.parent.parent
TOLERANCE = 1e-3
TEXTS = [
    "Hello, world! It's what they'd said: we'll see, I'm sure.",
    inspect.getsource(textwrap.dedent),
    "Zażółć gęślą jaźń — naïve café, Ελληνικά, русский, 日本語の文章, العربية, 😀👩‍👩‍👧 and \u00a0",
    "3.14159 1234567890 0x1F 1e-10 2024-01-31 12,345.67 a1b22c333 v2",
    " \t two  spaces\n\n\n   three\r\n\ttabs\t\tand trailing   ",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "",
    " ",
]
# From a GGUF, transformers builds the pre-tokenizer of GPT-2 whatever `tokenizer.ggml.pre` says; that of SmolLM cuts
# every numeral off first. The two agree on ASCII digits, since no merge joins them, and differ on these.
NUMERALS = ["x²", "a ½ b", "Ⅷ Ⅷ", "٣٤ x", "½²"]


@pytest.fixture(scope="module")
def worker():
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} names no interpreter with torch and transformers")
    with ReferenceWorker(os.environ[VARIABLE], ROOT / "scripts" / "reference_worker.py", threads=2) as found:
        yield found


@pytest.fixture(scope="module")
def smollm2():
    try:
        file = packaged("smollm2")
    except CheckpointError as error:
        pytest.skip(str(error))
    return load("smollm2"), {"folder": str(file.parent), "file": file.name}


def ask(worker, case, options, *inputs):
    """What the worker computes; a package that it lacks is a reason to skip."""
    try:
        label = worker.prepare(case, options, [inputs])
        found = worker.outputs(label)
        worker.drop(label)
    except WorkerError as error:
        if "ImportError" in str(error) or "ModuleNotFoundError" in str(error):
            pytest.skip(str(error))
        raise
    return found


@functools.partial(jax.jit, static_argnums=0)
def forward(graph, variables, tokens):
    return merge(Parts(graph, *variables))(tokens)[0]


@functools.partial(jax.jit, static_argnums=0)
def extend(graph, variables, tokens, cache):
    return merge(Parts(graph, *variables)).extend(tokens, cache)


def logits_of(model, tokens):
    graph, *variables = split(model)
    return np.asarray(forward(graph, variables, tokens))


def decode(model, tokens, prompt: int, count: int):
    """Logits of the prompt, and of `count` tokens behind it one by one: those given, then the most likely."""
    graph, *variables = split(model)
    cache = model.init_cache(1, prompt + count)
    logits, cache = extend(graph, variables, tokens[:, :prompt], cache)
    found, seen = [logits], tokens[:, :prompt]
    for i in range(prompt, prompt + count):
        likely = found[-1][:, -1].argmax(-1)[:, None].astype(jnp.int32)
        new = tokens[:, i : i + 1] if i < tokens.shape[1] else likely
        logits, cache = extend(graph, variables, new, cache)
        found, seen = [*found, logits], jnp.concatenate([seen, new], 1)
    return np.concatenate(found, 1), np.asarray(seen)


@pytest.mark.slow
def test_smollm2_logits(worker, smollm2):
    (model, tokenizer), options = smollm2
    text = (ROOT / "LICENSE").read_text()[:700] + TEXTS[1]
    tokens = np.asarray([tokenizer.encode(text)[:200]], np.int32)
    assert tokens.shape == (1, 200)
    (theirs,) = ask(worker, "transformers_logits", options, tokens)
    ours = logits_of(model, tokens)
    difference = np.abs(ours - theirs).max()
    print(f"largest difference of {ours.size} logits: {difference:.2e} (largest logit: {np.abs(theirs).max():.1f})")
    assert difference <= TOLERANCE
    cached, _ = decode(model, jnp.asarray(tokens), 150, 50)
    difference = np.abs(cached - ours).max()
    print(f"cached decoding against the full forward: {difference:.2e}")
    assert difference <= TOLERANCE


@pytest.mark.slow
def test_smollm2_as_latent_attention(smollm2):
    """TransMLA's exact form: the same logits at the same cache."""
    _, tokenizer = smollm2[0]
    source = load("smollm2", stack="loop", tokenizer=False).model
    transform = GroupedToLatent()
    latent = transform.values(transform.structure(copy.deepcopy(source)), source, ())
    tokens = np.asarray([tokenizer.encode((ROOT / "LICENSE").read_text() + TEXTS[1])[:200]], np.int32)
    difference = np.abs(logits_of(latent, tokens) - logits_of(source, tokens)).max()
    sizes = [memory.cache_bytes_per_token(functools.partial(model.init_cache, 1), 256) for model in (latent, source)]
    print(f"largest difference of the logits: {difference:.2e}; bytes of a token in the cache: {sizes}")
    assert difference <= 1e-4 and sizes[0] == sizes[1]


@pytest.mark.slow
def test_smollm2_greedy(worker, smollm2):
    (model, tokenizer), options = smollm2
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    tokens = np.asarray([tokenizer.encode(prompt, ends=False)], np.int32)
    (theirs,) = ask(worker, "transformers_greedy", {**options, "count": 20}, tokens)
    _, ours = decode(model, jnp.asarray(tokens), tokens.shape[1], 20)
    print(tokenizer.decode(ours[0], control=True))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_smollm2_tokens(worker, smollm2):
    (_, tokenizer), options = smollm2
    theirs = ask(worker, "transformers_tokens", {**options, "texts": TEXTS})
    for text, tokens in zip(TEXTS, theirs, strict=True):
        ours = tokenizer.encode(text)
        assert ours == tokens.tolist(), text
        assert tokenizer.decode(ours, control=True) == text


@pytest.mark.slow
def test_smollm2_tokens_of_llama_cpp(worker, smollm2):
    """On these, and on a thousand lines of the standard library."""
    (_, tokenizer), options = smollm2
    texts = [*TEXTS, *NUMERALS, inspect.getsource(inspect)[:40_000]]
    theirs = ask(worker, "llama_cpp_tokens", {**options, "texts": texts})
    for text, tokens in zip(texts, theirs, strict=True):
        assert tokenizer.encode(text) == tokens.tolist(), text[:200]
    print(f"{sum(map(len, theirs))} tokens are equal")


@pytest.mark.slow
def test_the_page(smollm2, capsys):
    """The program of docs/pretrained.md prints what stands beside it."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pretrained.md").read_text(), re.DOTALL)
    exec(compile(program, "docs/pretrained.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "The capital of France is Paris."


SMALL = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "head_dim": 10,
    "max_position_embeddings": 64,
}
KINDS = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500.0, "tie_word_embeddings": True},
    "llama biased": {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": False},
    "llama scaled": {
        "model_type": "llama",
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 300.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0},
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2", "head_dim": 6, "tie_word_embeddings": True},
    "qwen2 window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_small_ones_of_every_kind(worker, tmp_path, kind):
    """Random models that transformers writes as safetensors in shards, read here by both kinds of stack."""
    tokens = np.random.default_rng(0).integers(0, 50, (2, 20)).astype(np.int32)
    options = {"random": {**SMALL, **KINDS[kind]}, "folder": str(tmp_path), "shard": "10KB"}
    (theirs,) = ask(worker, "transformers_logits", options, tokens)
    for stack in ("loop", "scan"):
        model, tokenizer = load(tmp_path, stack=stack)
        assert tokenizer is None
        difference = np.abs(logits_of(model, tokens) - theirs).max()
        print(f"{kind}, {stack}: {difference:.2e} (largest logit: {np.abs(theirs).max():.1f})")
        assert difference <= TOLERANCE
