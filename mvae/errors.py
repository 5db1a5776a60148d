"""Errors that a user can mend: the scripts print them as one line, without a traceback.

A message names a parameter in backticks: `batch_size`. The scripts print the flag in its place: --batch-size.
"""


class UserError(Exception):
    """What was wrong and what would be right, in one line. Scripts print it and exit with `status`."""

    status = 1


class UsageError(UserError):
    """A wrong call: a parameter or value that isn't allowed. Scripts exit with status 2, as argparse does."""

    status = 2
