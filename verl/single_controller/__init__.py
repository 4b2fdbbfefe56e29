"""The vocabulary of the single controller. Importing it imports ray; the workers import `decorator` and `worker` only."""
