"""Model families: what each asks of the host."""
