"""Training: the trainer, one step, DeepSpeed's engine, validation, metrics."""
