"""The command line `search-r1`: one name for every command of the project.

Only the standard library is imported here, so that help and completion come at once. What a command
needs is imported when it runs.
"""
