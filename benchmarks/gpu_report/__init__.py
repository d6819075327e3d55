"""One command for a machine with an NVIDIA GPU: what works there, what is right, and how fast it is."""
