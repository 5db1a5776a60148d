"""Errors of the user: scripts print them as one line on stderr, without a traceback."""

import errno
import re


class UserError(Exception):
    """What is wrong and what would be right, in one line. Scripts print it and exit with `status`."""

    status = 1


class UsageError(UserError):
    """A wrong call: a parameter or value that isn't allowed. Scripts exit with status 2, as argparse does."""

    status = 2


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the machine or a GPU ran out of memory, for which torch raises several kinds of error."""
    no_memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    return no_memory or re.search("(out of|not enough|t allocate) memory", str(error)) is not None
