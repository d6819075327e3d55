// The num_kept largest of a row's float32 keys, as ascending indices; exact, the lower index first among equals.
#pragma once

#include <cstdint>

#include "warp.cuh"

namespace hawk {

constexpr int kThreads = 1024;  // one block selects a row
constexpr int kWarps = kThreads / kWarp;
constexpr int kHeld = 16;  // keys that a thread keeps in registers: 16,384 a row
constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
constexpr int kPasses = 32 / kDigitBits;

// The order of float32 keys as unsigned integers; 0 is a NaN.
__device__ __forceinline__ uint32_t ordered(float key) {
    if (key != key) {
        return 0U;
    }
    uint32_t const bits = key == 0.0F ? 0U : __float_as_uint(key);
    return (bits & 0x80000000U) != 0U ? ~bits : bits | 0x80000000U;
}

// The keys of a row, a run of neighbouring positions a warp, so that a warp meets them in index order.
struct RowKeys {
    uint32_t const* keys;
    int seq_len;
    int first;  // position of this lane's first key
    int items;  // keys of a lane
    uint32_t held[kHeld];

    __device__ RowKeys(uint32_t const* row_keys, int length) : keys(row_keys), seq_len(length) {
        items = (seq_len + kThreads - 1) / kThreads;
        first = warp_id() * items * kWarp + lane_id();
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            held[i] = i < items ? load(i) : 0U;
        }
    }

    // Past the caches of the multiprocessor: other blocks wrote them.
    __device__ uint32_t load(int item) const {
        int const n = first + item * kWarp;
        return n < seq_len ? __ldcg(keys + n) : 0U;
    }

    // visit(key, position, whether the position exists) for each key, all lanes together.
    template <typename Visit>
    __device__ void each(Visit visit) const {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            if (i < items) {
                int const n = first + i * kWarp;
                visit(held[i], n, n < seq_len);
            }
        }
        for (int i = kHeld; i < items; ++i) {
            int const n = first + i * kWarp;
            visit(load(i), n, n < seq_len);
        }
    }
};

// The digit where the count from the largest bin down reaches wanted, and how many are still wanted in that
// bin. Warp 0; a lane holds kBins / kWarp bins.
__device__ inline void choose_digit(uint32_t const* histogram, int shift, uint32_t& prefix, uint32_t& wanted) {
    constexpr int kOwn = kBins / kWarp;
    int const top_bin = kBins - 1 - lane_id() * kOwn;
    uint32_t count = 0;
    for (int i = 0; i < kOwn; ++i) {
        count += histogram[top_bin - i];
    }
    uint32_t up_to = count;
    for (int distance = 1; distance < kWarp; distance *= 2) {
        uint32_t const other = __shfl_up_sync(kAllLanes, up_to, distance);
        up_to += lane_id() >= distance ? other : 0U;
    }
    uint32_t const goal = wanted;
    __syncwarp(kAllLanes);  // all have read wanted before one lane changes it
    uint32_t before = up_to - count;
    if (before < goal && goal <= up_to) {
        int bin = top_bin;
        while (before + histogram[bin] < goal) {
            before += histogram[bin];
            --bin;
        }
        prefix |= static_cast<uint32_t>(bin) << shift;
        wanted = goal - before;
    }
}

// Radix select, most significant digit first, then compaction in index order. A whole block.
__device__ inline void select_row(uint32_t const* row_keys, int32_t* kept, int seq_len, int num_kept) {
    __shared__ uint32_t histograms[kPasses][kBins];
    __shared__ uint32_t prefix;
    __shared__ uint32_t wanted;
    __shared__ int larger_of_warp[kWarps];
    __shared__ int equal_of_warp[kWarps];

    if (num_kept == seq_len) {
        for (int n = static_cast<int>(threadIdx.x); n < seq_len; n += kThreads) {
            kept[n] = n;
        }
        return;
    }
    RowKeys const row(row_keys, seq_len);
    for (int i = static_cast<int>(threadIdx.x); i < kPasses * kBins; i += kThreads) {
        histograms[i / kBins][i % kBins] = 0;
    }
    if (threadIdx.x == 0) {
        prefix = 0;
        wanted = static_cast<uint32_t>(num_kept);
    }
    __syncthreads();
    for (int pass = 0; pass < kPasses; ++pass) {
        int const shift = kDigitBits * (kPasses - 1 - pass);
        uint32_t const known = pass == 0 ? 0U : ~0U << (shift + kDigitBits);
        uint32_t const chosen = prefix;
        uint32_t* const histogram = histograms[pass];
        row.each([&](uint32_t key, int, bool exists) {
            if (exists && (key & known) == chosen) {
                atomicAdd(&histogram[(key >> shift) & (kBins - 1)], 1U);
            }
        });
        __syncthreads();
        if (warp_id() == 0) {
            choose_digit(histogram, shift, prefix, wanted);
        }
        __syncthreads();
    }

    // The num_kept-th largest key is prefix; of those equal to it, the first `ties` are kept.
    uint32_t const threshold = prefix;
    int const ties = static_cast<int>(wanted);
    int larger = 0;
    int equal = 0;
    row.each([&](uint32_t key, int, bool exists) {
        larger += __popc(__ballot_sync(kAllLanes, exists && key > threshold));
        equal += __popc(__ballot_sync(kAllLanes, exists && key == threshold));
    });
    if (lane_id() == 0) {
        larger_of_warp[warp_id()] = larger;
        equal_of_warp[warp_id()] = equal;
    }
    __syncthreads();
    larger = 0;
    equal = 0;
    for (int warp = 0; warp < warp_id(); ++warp) {
        larger += larger_of_warp[warp];
        equal += equal_of_warp[warp];
    }
    unsigned const lower_lanes = (1U << lane_id()) - 1U;
    row.each([&](uint32_t key, int n, bool exists) {
        unsigned const larger_lanes = __ballot_sync(kAllLanes, exists && key > threshold);
        unsigned const equal_lanes = __ballot_sync(kAllLanes, exists && key == threshold);
        int const equal_before = equal + __popc(equal_lanes & lower_lanes);
        if (exists && (key > threshold || (key == threshold && equal_before < ties))) {
            kept[larger + __popc(larger_lanes & lower_lanes) + min(equal_before, ties)] = n;
        }
        larger += __popc(larger_lanes);
        equal += __popc(equal_lanes);
    });
}

}  // namespace hawk
