"""How much each query head matters, measured offline by leaving it out: the weights that HAWK scores with.

checkpoint   a checkpoint folder                          -> its tokenizer, image settings and fingerprint
ablation     a prompt and heads                           -> the answers without each of them, in PyTorch
work         data sets, samples and heads                 -> the units of work, and who does one
shards       units                                        -> their results, here or on a Ray cluster
importance   scores of samples x heads                    -> weights, their intervals, and whether they differ
report       all of it                                    -> a weights file with where it came from
"""
