"""What a configuration takes, computed before it runs: GPU memory and seconds of a step.

A tool beside the training library, which imports nothing of it.
"""
