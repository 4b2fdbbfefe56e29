"""The vocabulary of the single controller. Only `worker_group` imports ray."""
