"""The errors that a person can mend.

`launch.py` prints their message alone and exits with 2; any other exception is a fault of ours and keeps its traceback.
"""


class UserError(Exception):
    """A bad setting, file, database, checkpoint or service. The message names it and says what to do."""


class InfrastructureError(UserError):
    """Something outside the model failed (a missing database, a dead service): never scored as an answer."""
