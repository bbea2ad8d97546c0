"""The one exception that a user's mistake raises."""


class HypenetError(ValueError):
    """A mistake in the input: one sentence naming the thing, its value and the remedy.

    The command line prints the sentence alone and exits with code 2; a library caller sees an ordinary
    `ValueError`.
    """
