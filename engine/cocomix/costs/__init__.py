"""What a run needs and costs: memory, communication and time, predicted and measured."""
