"""Processes: how they start, agree, fail and end, and what they write together: checkpoints and exports."""
