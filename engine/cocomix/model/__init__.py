"""The student: its configuration, blocks, caches, and checkpoints of others."""
