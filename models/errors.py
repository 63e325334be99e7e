"""The two ways a command ends badly on purpose. Anything else that reaches the user is a bug."""


class UserError(Exception):
    """The user's mistake: one line that ends in what to do next. The command exits with 2."""


class GateError(Exception):
    """A measured number missed its limit. The message names the number, the limit and the artifact. Exit code 1."""
