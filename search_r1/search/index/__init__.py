"""Corpora and indexes on disk: read, checked, and written whole or not at all."""
