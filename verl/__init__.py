"""A compact RL training library for language models, on Ray, FSDP2 and vLLM.

It knows nothing of any task.
"""
