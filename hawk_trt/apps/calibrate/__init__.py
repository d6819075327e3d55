"""How much each query head matters, measured offline by leaving it out: the weights that HAWK scores with.

checkpoint   a checkpoint folder                          -> its tokenizer, image settings and fingerprint
work         questions and heads                          -> the units of work, and which of them are left
worker       a unit                                       -> its answers without each of its heads, in PyTorch or on Ray
importance   scores of samples x heads                    -> weights, their intervals, and whether they differ
report       all of it                                    -> a weights file with where it came from

The model, the questions and their metric are given by whoever makes the plan.
"""
