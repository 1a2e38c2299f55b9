"""Eight virtual CPU devices, and one compilation cache outside the clone for all workers and runs of the suite."""

import datetime
import gc
import json
import os
import pathlib
import sys

import pytest

MOST_MAPS = 10_000
SUPPORT = pathlib.Path(__file__).parent.parent / "docs" / "support.json"


def pytest_addoption(parser):
    parser.addoption(
        "--support", action="store_true", help="note in docs/support.json what passing tests have shown of each op"
    )


def pytest_configure(config):
    if "gpu" in config.option.markexpr and "not gpu" not in config.option.markexpr:
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    # Most of the suite's time is compilation, of programs that run once: machine code is not optimised.
    for flag, value in (("xla_force_host_platform_device_count", 8), ("xla_backend_optimization_level", 0)):
        if flag not in flags:
            flags = f"{flags} --{flag}={value}".strip()
    os.environ["XLA_FLAGS"] = flags
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lissom" / "compiled-tests"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    # The smallest ones too: both workers need them, and again once `few_maps` has dropped them.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Tracing makes many objects that live on, over which the usual thresholds let collections go again and again.
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def few_maps():
    """Compiled programs that later tests will not run are dropped. Each takes some maps of memory, of which Linux
    allows a process 65530: beyond that, loading a further program is a segmentation fault."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if "jax" in sys.modules and maps.is_file() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        sys.modules["jax"].clear_caches()
        gc.collect()


# ---- what runs where: passing tests say what they have shown (lissom.ops.testing.show) -----------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    # On a worker of xdist; the report carries it to the process that writes.
    if item.config.getoption("--support"):
        from lissom.ops import testing

        if call.when == "call" and call.excinfo is None:
            item.user_properties.append(("shown", sorted(set(map(tuple, testing.shown)))))
        testing.shown.clear()


_shown: set[tuple[str, ...]] = set()


def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        _shown.update(tuple(fact) for name, facts in report.user_properties if name == "shown" for fact in facts)


def pytest_sessionfinish(session):
    if not session.config.getoption("--support") or hasattr(session.config, "workerinput"):
        return
    known = json.loads(SUPPORT.read_text()) if SUPPORT.is_file() else {}
    today = datetime.date.today().isoformat()
    for op, implementation, platform, fact in _shown:
        known.setdefault(op, {}).setdefault(implementation, {}).setdefault(platform, {})[fact] = today
    SUPPORT.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


@pytest.fixture
def tiny_run(tmp_path):
    """Trains a recipe's tiny mode with overrides on one device: tiny_run(recipe, name, **{"a.b": value})."""

    def run(recipe: str, name: str = "run", **overrides):
        from lissom.train import train
        from lissom.training.config import load_recipe, overridden

        overrides = {"mesh.data": 1, **overrides}
        config = overridden(load_recipe(f"configs/{recipe}.py:tiny"), overrides.items())
        return train(config, tmp_path / name), tmp_path / name

    return run
