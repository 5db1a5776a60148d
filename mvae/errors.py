"""Errors that a user can mend: the scripts print them as one line, without a traceback.

A message names a parameter in backticks: `batch_size`. The scripts print the flag in its place: --batch-size.
"""

import errno
import re


class UserError(Exception):
    """What was wrong and what would be right, in one line. Scripts print it and exit with `status`."""

    status = 1


class UsageError(UserError):
    """A wrong call: a parameter or value that isn't allowed. Scripts exit with status 2, as argparse does."""

    status = 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory didn't suffice, of the machine or of a GPU. torch has several errors for that."""
    no_memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return no_memory or re.search("(out of|not enough|t allocate) memory", str(error)) is not None
