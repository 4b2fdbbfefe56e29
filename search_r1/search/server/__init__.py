"""The HTTP server over one engine: application, batches, limits, metrics, logs."""
