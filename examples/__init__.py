"""What the examples need as code: the tiny model's task."""
