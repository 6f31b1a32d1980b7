"""The one exception that is the user's to mend."""


class UserError(Exception):
    """Bad input: one clear line with the value and the remedy.

    Command lines print it and exit with code 2.
    """
