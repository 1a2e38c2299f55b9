"""Eight virtual CPU devices, and one compilation cache outside the clone for all workers and runs of the suite."""

import os
import pathlib

import pytest


def pytest_configure(config):
    if "gpu" in config.option.markexpr and "not gpu" not in config.option.markexpr:
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lissom" / "compiled-tests"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


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
