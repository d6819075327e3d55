// hawk::WeightedTopK on raw device pointers. Knows no TensorRT and no framework.
//
//     s(b,h,n)   = head_scores(b,h,n) where visual_rows(b,n) >= 0 and the score is finite, else 0
//     normal     = l2       s / max(||s||, 1e-12)
//                  softmax  exp(s - max) / max(sum exp(s - max), 1e-30)
//                  minmax   (s - min) / max(max - min, 2^-23)
//                  per head over the visual tokens of the row; 0 elsewhere
//     score(b,n) = sum_h head_weights(h) normal(b,h,n)
//     key(b,n)   = select_bias(b,n) where |select_bias| >= 3e38, else score + select_bias
//     kept(b)    = the num_kept largest keys of the row, as ascending indices
//
// Everything is float32 and accumulated in float32, in an order that depends on the shape alone: equal
// inputs give equal bits. The selection is exact for every num_kept from 1 to seq_len. -0 equals +0, the lower
// index wins a tie, and a NaN key (a NaN weight or bias makes one; a NaN score cannot) comes after all others.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace hawk {

enum class Normalization : int32_t { kL2 = 0, kSoftmax = 1, kMinMax = 2 };

// The most heads and rows that one call takes.
constexpr int64_t kMaxHeads = 1024;
constexpr int64_t kMaxBatch = 65535;
constexpr int64_t kMaxSeqLen = int64_t{1} << 30;

struct WeightedTopKSizes {
    int64_t batch;
    int64_t heads;
    int64_t seq_len;
    int64_t num_kept;  // 1 to seq_len
};

struct WeightedTopKTensors {
    float const* head_scores;    // [batch, heads, seq_len]
    float const* head_weights;   // [heads], used as given
    int64_t const* visual_rows;  // [batch, seq_len], below 0 where a position is not visual
    float const* select_bias;    // [batch, seq_len]
    int32_t* kept_indices;       // [batch, num_kept], written, ascending
    float* scores;               // [batch, seq_len], written: before the bias, 0 where not visual
};

// Bytes of scratch that a call of these sizes, or of any smaller ones, needs; 256-byte aligned, any contents.
std::size_t weighted_topk_workspace_bytes(int64_t batch, int64_t heads, int64_t seq_len);

// Enqueues the whole rule on the stream: one launch up to 512 positions, else two. No synchronisation and no
// allocation, so it can be captured in a CUDA graph. Returns cudaErrorInvalidValue for sizes out of range.
cudaError_t weighted_topk(Normalization normalization, WeightedTopKTensors const& tensors,
                          WeightedTopKSizes const& sizes, void* workspace, cudaStream_t stream);

}  // namespace hawk
