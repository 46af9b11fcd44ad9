"""What permprune says when it cannot go on."""


class PermpruneError(Exception):
    """Bad input or a failed check: one line for a person, saying what is wrong and what to do.

    The command line prints the message and exits with 2; Python callers may catch it.
    """
