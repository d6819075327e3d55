"""The TensorRT plugin hawk::WeightedTopK in C++ and CUDA, and what checks it."""
