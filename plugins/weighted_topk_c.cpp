// C entries to the kernel alone, for ctypes: on a GPU without TensorRT, and in the tests on a CPU.
#include "weighted_topk_kernel.cuh"

#define HAWK_EXPORT extern "C" __attribute__((visibility("default")))

HAWK_EXPORT std::size_t hawk_topk_workspace_bytes(int64_t batch, int64_t heads, int64_t seq_len) {
    return hawk::weighted_topk_workspace_bytes(batch, heads, seq_len);
}

// normalization: 0 l2, 1 softmax, 2 minmax. Returns a cudaError_t; hawk_topk_error says what it means.
HAWK_EXPORT int32_t hawk_topk(int32_t normalization, float const* head_scores, float const* head_weights,
                              int64_t const* visual_rows, float const* select_bias, int32_t* kept_indices,
                              float* scores, int64_t batch, int64_t heads, int64_t seq_len, int64_t num_kept,
                              void* workspace, void* stream) {
    return static_cast<int32_t>(
        hawk::weighted_topk(static_cast<hawk::Normalization>(normalization),
                            {head_scores, head_weights, visual_rows, select_bias, kept_indices, scores},
                            {batch, heads, seq_len, num_kept}, workspace, static_cast<cudaStream_t>(stream)));
}

HAWK_EXPORT char const* hawk_topk_error(int32_t status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
