"""The TensorRT backend: an engine folder's plans on one GPU. Needs tensorrt and cuda-bindings, and no torch.

backend.py     TensorRtBackend: load, encode, score, prefill, decode, close
vision.py      the vision stage: feeds in, visual rows where the first layer reads them
decode.py      the decode step over the slots in use, replayed as a CUDA graph where its shapes stand still
cache.py       the KV cache, in place or portable: slots, and the rows that have them
states.py      beside it the states of linear layers
memory.py      what lies where on the GPU: one allocation for the largest request
engine.py      plans, execution contexts, shapes and addresses; what TensorRT says, kept for error messages
cuda.py        the CUDA driver: memory, copies through pinned memory, events, graphs
"""
