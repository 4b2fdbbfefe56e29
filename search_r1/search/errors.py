"""What the commands of this package report as `error: ...`, without a traceback."""


class RetrieverError(ValueError):
    """An engine that cannot be loaded as it was asked for: a key, model or package is missing.

    The message names what is missing, and the cure.
    """


class CorpusError(RetrieverError):
    """A corpus or an index that cannot be used.

    The message names the file, and the line or the cure.
    """
