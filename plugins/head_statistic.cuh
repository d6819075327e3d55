// What the norm of a head needs to know of its scores, gathered in parts: by lanes, chunks and warps.
#pragma once

#include <cfloat>
#include <cstdint>

#include "warp.cuh"
#include "weighted_topk_kernel.cuh"

namespace hawk {

constexpr int kMaxChunks = 128;  // partial statistics of a head
constexpr int kBatch = 8;        // loads in flight per thread
constexpr float kL2Floor = 1e-12F;
constexpr float kSoftmaxFloor = 1e-30F;
constexpr float kMinMaxFloor = FLT_EPSILON;
constexpr float kLargest = 3.0e38F;  // where the oracle starts a maximum or minimum

__device__ __forceinline__ float finite_or_zero(float value) { return fabsf(value) <= FLT_MAX ? value : 0.0F; }

// What a head's norm needs, mergeable in any grouping:
//   l2 {sum of squares, -}, softmax {max, sum exp(s - max)}, minmax {max, min}
template <Normalization kNorm>
struct Statistic {
    __device__ static float2 empty() {
        if (kNorm == Normalization::kL2) {
            return {0.0F, 0.0F};
        }
        return {-kLargest, kNorm == Normalization::kSoftmax ? 0.0F : kLargest};
    }

    __device__ static float2 of(float value) {
        if (kNorm == Normalization::kL2) {
            return {value * value, 0.0F};
        }
        if (kNorm == Normalization::kSoftmax) {  // the oracle's maximum starts at -3e38 as well
            float const top = fmaxf(value, -kLargest);
            return {top, expf(value - top)};
        }
        return {value, value};
    }

    __device__ static float2 merged(float2 a, float2 b) {
        if (kNorm == Normalization::kL2) {
            return {a.x + b.x, 0.0F};
        }
        float const top = fmaxf(a.x, b.x);
        if (kNorm == Normalization::kSoftmax) {
            return {top, a.y * expf(a.x - top) + b.y * expf(b.x - top)};
        }
        return {top, fminf(a.y, b.y)};
    }

    // Over the lanes of a warp; every lane has the result.
    __device__ static float2 merged_over_warp(float2 own) {
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            float2 const other = {__shfl_xor_sync(kAllLanes, own.x, distance),
                                  __shfl_xor_sync(kAllLanes, own.y, distance)};
            own = merged(own, other);
        }
        return own;
    }

    // {shift, divisor} for normal().
    __device__ static float2 scale(float2 all) {
        if (kNorm == Normalization::kL2) {
            return {0.0F, fmaxf(sqrtf(all.x), kL2Floor)};
        }
        if (kNorm == Normalization::kSoftmax) {
            return {all.x, fmaxf(all.y, kSoftmaxFloor)};
        }
        return {all.y, fmaxf(all.x - all.y, kMinMaxFloor)};
    }

    __device__ static float normal(float value, float2 scale) {
        float const shifted = value - scale.x;
        return (kNorm == Normalization::kSoftmax ? expf(shifted) : shifted) / scale.y;
    }
};

// The statistic of one head over the visual positions in [begin, end); all lanes of a warp take part.
template <Normalization kNorm>
__device__ float2 statistic_of_positions(float const* scores, int64_t const* rows, int begin, int end) {
    float2 own = Statistic<kNorm>::empty();
    for (int first = begin + lane_id(); first < end; first += kWarp * kBatch) {
        float value[kBatch];
        bool visual[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            int const n = first + i * kWarp;
            visual[i] = n < end && __ldg(rows + n) >= 0;
            value[i] = n < end ? __ldg(scores + n) : 0.0F;
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (visual[i]) {
                own = Statistic<kNorm>::merged(own, Statistic<kNorm>::of(finite_or_zero(value[i])));
            }
        }
    }
    return Statistic<kNorm>::merged_over_warp(own);
}

template <Normalization kNorm>
__device__ float2 statistic_of_partials(float2 const* partials, int count) {
    float2 own = Statistic<kNorm>::empty();
#pragma unroll
    for (int i = 0; i < kMaxChunks / kWarp; ++i) {
        int const chunk = i * kWarp + lane_id();
        if (chunk < count) {
            own = Statistic<kNorm>::merged(own, partials[chunk]);
        }
    }
    return Statistic<kNorm>::merged_over_warp(own);
}

}  // namespace hawk
