"""Time and memory by stage, and advice on the keep ratio."""
