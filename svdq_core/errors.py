"""The one exception users see: it says which file, which key, what was expected, and what to do."""


class SVDQuantError(ValueError):
    """Bad input, explained in words that a user can act on."""
