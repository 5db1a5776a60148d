"""Errors that a user can mend: the scripts print them as one line, without a traceback."""


class UserError(Exception):
    """What was wrong and what would be right, in one line. Scripts print it and exit with `status`."""

    status = 1


class UsageError(UserError):
    """A wrong call: a flag or value that isn't allowed. Scripts exit with status 2, as argparse does."""

    status = 2
