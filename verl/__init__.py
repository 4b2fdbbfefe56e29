"""A compact RL training library for language models: Ray, FSDP2, vLLM. It knows nothing of any
task."""
