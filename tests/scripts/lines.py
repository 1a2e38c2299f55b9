"""Command lines of scripts, several in one process."""

import contextlib
import types

from absl import flags


@contextlib.contextmanager
def command_line(script: types.ModuleType):
    """Each command line defines its flags; they are gone behind it."""
    try:
        yield
    finally:
        # Its own only: what it imports for the first time (grain) defines flags of the process.
        for flag in list(flags.FLAGS.flags_by_module_dict().get(script.__name__, ())):
            delattr(flags.FLAGS, flag.name)
