"""The engines; `load` makes one from the flags of the server."""
