"""The one exception that is the user's to mend, and the one that time may."""

import os


class UserError(Exception):
    """Bad input: one clear line with the value and the remedy.

    Command lines print it and exit with its `code`, 2.
    """

    code = 2


class Lost(UserError):
    """Another process of the job is gone or did not come: the same command may well go on."""

    code = os.EX_TEMPFAIL
