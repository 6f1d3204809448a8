"""What a trained model is used for: evaluation, generation, steering, looking at concepts."""
