"""Parity: the exported bundle against the checkpoint's own PyTorch model, stage by stage.

    prompt_rules  what the paper leaves to the host: positions, query range, kept counts; plain Python
    reference     the PyTorch model with HAWK inserted, unabsorbed
    reference_models  what it needs of each family; these two are the only files that import torch
    compare       stage outputs of both sides -> rows of numbers
    report        cases through both sides -> rows, as tables or JSON

The reference shares nothing with what it checks except the inputs (ModelInputs, PruningConfig).
"""
