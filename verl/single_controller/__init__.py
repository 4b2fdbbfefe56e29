"""The single controller: workers on ranks and how the driver calls them.

Only `worker_group` imports ray.
"""
