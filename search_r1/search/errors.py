"""Errors that the commands of this package report as `error: ...`, without a traceback."""


class RetrieverError(ValueError):
    """An engine cannot be loaded as asked for, because a key, a model or a package is missing.

    The message names what is missing, and what to do.
    """


class CorpusError(RetrieverError):
    """A corpus or an index cannot be used.

    The message names the file, and the line or what to do.
    """
