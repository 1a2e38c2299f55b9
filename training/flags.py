"""The command line of every script: absl flags, and --config / --config.field=value read by `training.config`."""

import sys
from collections.abc import Callable

import ml_collections
from absl import flags

from lissom.training import config as recipes
from lissom.training.errors import UserError

CONFIG_HELP = """
  --config: the recipe, a path with an optional mode: configs/vision/digits_vit.py:tiny
    (train.py, compare.py, training_steps.py)
  --config.FIELD=VALUE: another value of a field of the recipe: --config.model.mixer=window --config.seed=3
"""


def parse(argv: list[str], *, recipe: bool = True) -> list[tuple[str, str]]:
    """Parses absl flags; returns the (field, text) pairs of --config.field=value. The recipe is the pair ("", spec).
    A script without a `recipe` has no --config in its help, and refuses the pairs itself."""
    rest, pairs, words = [argv[0]], [], iter(argv[1:])
    for word in words:
        name, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and (name == "config" or name.startswith("config.")):
            if not equals:
                value = next(words, None)
                if value is None:
                    raise UserError(f"{word} needs a value")
            pairs.append((name[len("config.") :], value))
        else:
            rest.append(word)
    if any(word in ("--help", "-h", "--helpfull") for word in rest):
        print(sys.modules["__main__"].__doc__, flags.FLAGS.main_module_help(), CONFIG_HELP if recipe else "", sep="\n")
        raise SystemExit(0)
    try:
        extra = flags.FLAGS(rest)
    except flags.Error as error:
        raise UserError(str(error).replace("\n", " ")) from error
    if len(extra) > 1:
        raise UserError(f"{extra[1]!r} is no flag: settings are written --name=value")
    return pairs


def config_from(pairs: list[tuple[str, str]]) -> tuple[str, ml_collections.ConfigDict]:
    """(recipe, resolved and checked config) of what `parse` returned."""
    specs = [value for key, value in pairs if not key]
    if not specs:
        listing = "\n".join(f"  {name:44s} {doc}" for name, doc in recipes.recipes().items())
        raise UserError(f"--config=RECIPE is missing; the recipes are:\n{listing}")
    lengths = [key for key, _ in pairs if key.startswith("train.")]
    if len(set(lengths)) > 1:
        raise UserError(f"--config.{' and --config.'.join(lengths)} contradict each other: a run has one length")
    config = recipes.overridden(recipes.load_recipe(specs[-1]), [(key, value) for key, value in pairs if key])
    recipes.check(config)
    return specs[-1], config


def modes_of(pairs: list[tuple[str, str]]) -> Callable[[str], ml_collections.ConfigDict]:
    """mode -> the config of what `parse` returned, of another mode of its recipe."""
    recipe = config_from(pairs)[0].partition(":")[0]
    return lambda mode: config_from([*pairs, ("", f"{recipe}:{mode}")])[1]


def shard_of(text: str) -> tuple[int, int]:
    """'1/4' -> (1, 4)."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise UserError(f"--shard={text} must be i/n with 0 <= i < n")
    return int(index), int(count)
