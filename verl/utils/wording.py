"""Numbers in sentences."""


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number with its noun, whose plural ends with s unless `many` is given.

    >>> counted(1, "GPU"), counted(8000, "GPU"), counted(0, "search", "searches")
    ('1 GPU', '8,000 GPUs', '0 searches')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"
