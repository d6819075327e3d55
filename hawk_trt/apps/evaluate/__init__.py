"""How well a bundle answers: data sets, metrics, intervals, and trials that survive being killed.

datasets    a folder, a JSONL file or the tiny task    -> samples
metrics     an answer and a sample                     -> a score in [0, 1]
trials      a pipeline, a sample and a pruning         -> one trial
result_log  trials                                     -> a JSONL file that a killed run goes on with
summary     trials                                     -> accuracy with its interval, tokens, time, cache
report      summaries                                  -> JSON, CSV and PNGs
calibration, calibration_worker, importance   how much each query head matters
fastv       the one selector that drops tokens inside the decoder, in PyTorch
"""
