"""Mistakes that a user can make: the message is one sentence, the process ends with exit code 2."""

import contextlib
import errno
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """Something in a config, a flag, a path, a checkpoint or the machine that the user can put right."""


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Turns a UserError, and the other rooms' errors of that kind, into one line on stderr and exit code 2."""
    from lissom.data.errors import DataError
    from lissom.models.registry import UnknownName, WrongType

    try:
        yield
    except (UserError, UnknownName, WrongType, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"error: {error.filename or 'a file of the run'} could not be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
