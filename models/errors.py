"""The three ways a command ends badly that were foreseen. Anything else that reaches the user is a bug."""

import errno

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # of an OSError: the place takes no more bytes


class UserError(Exception):
    """The user's mistake: one line that ends in what to do next. The command exits with 2."""


class GateError(Exception):
    """A measured number missed its limit. The message names the number, the limit and the artifact. Exit code 1."""


class StageDied(Exception):
    """A stage broke in a way that nobody foresaw: a bug, or a machine out of memory. The message names its log. Exit code 3."""
