"""The TensorRT plugin hawk::WeightedTopK in C++ and CUDA."""
