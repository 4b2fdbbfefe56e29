"""A compact RL training library for language models, on Ray, FSDP2 and vLLM.

It knows nothing of any task.
"""

from verl.namesake import warn_of_namesake

warn_of_namesake()
