// The two launches of hawk::WeightedTopK (the rule is in weighted_topk_kernel.cuh):
//
//   head_statistics  a warp a head and chunk of positions: what the norm needs, as partial results
//   weigh_and_select a block a tile of positions: merges the partials, weighs, makes keys; the block of a row
//                    that finishes last then selects the row
//
// A row of up to kOneBlock positions takes the second alone: its block makes the statistics itself.
#include "weighted_topk_kernel.cuh"

#include <cfloat>

namespace hawk {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffU;
constexpr int kStatisticThreads = 256;
constexpr int kThreads = 1024;  // one block selects a row
constexpr int kWarps = kThreads / kWarp;
constexpr int kTile = 256;                 // positions that a block weighs at a time
constexpr int kGroups = kThreads / kTile;  // threads that share a position, each with every kGroups-th head
constexpr int kMaxChunks = 128;            // partial statistics of a head
constexpr int kOneBlock = 512;             // positions up to which a launch less is worth more than more blocks
constexpr int kBatch = 8;                  // loads in flight per thread
constexpr int kHeld = 16;                  // keys that a thread keeps in registers: 16,384 a row
constexpr int kBins = 256;
constexpr int kPasses = 4;

constexpr float kDecides = 3.0e38F;  // a bias of this size decides alone
constexpr float kL2Floor = 1e-12F;
constexpr float kSoftmaxFloor = 1e-30F;
constexpr float kMinMaxFloor = FLT_EPSILON;

struct Work {
    WeightedTopKTensors tensors;
    float2* partials;   // [batch, heads, num_chunks]
    uint32_t* keys;     // [batch, seq_len]
    uint32_t* tickets;  // [batch], blocks of the row that are done
    int heads;
    int seq_len;
    int num_kept;
    int chunk;
    int num_chunks;
};

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }
__device__ __forceinline__ float finite_or_zero(float value) { return fabsf(value) <= FLT_MAX ? value : 0.0F; }

// What a head's norm needs, mergeable in any grouping:
//   l2 {sum of squares, -}, softmax {max, sum exp(s - max)}, minmax {max, min}
template <Normalization kNorm>
struct Statistic {
    __device__ static float2 empty() {
        if (kNorm == Normalization::kL2) {
            return {0.0F, 0.0F};
        }
        return {-kDecides, kNorm == Normalization::kSoftmax ? 0.0F : kDecides};
    }

    __device__ static float2 of(float value) {
        if (kNorm == Normalization::kL2) {
            return {value * value, 0.0F};
        }
        if (kNorm == Normalization::kSoftmax) {  // the oracle's maximum starts at -3e38 as well
            float const top = fmaxf(value, -kDecides);
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

// grid (num_chunks, ceil(heads / warps of a block), batch)
template <Normalization kNorm>
__global__ void __launch_bounds__(kStatisticThreads) head_statistics(Work work) {
    int64_t const row = blockIdx.z;
    int const chunk = static_cast<int>(blockIdx.x);
    int const head = static_cast<int>(blockIdx.y) * (kStatisticThreads / kWarp) + warp_id();
    if (chunk == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
        work.tickets[row] = 0;
    }
    if (head >= work.heads) {  // the whole warp
        return;
    }
    int const begin = chunk * work.chunk;
    int const end = min(begin + work.chunk, work.seq_len);
    int64_t const row_head = row * work.heads + head;
    float2 const all = statistic_of_positions<kNorm>(work.tensors.head_scores + row_head * work.seq_len,
                                                     work.tensors.visual_rows + row * work.seq_len, begin, end);
    if (lane_id() == 0) {
        work.partials[row_head * work.num_chunks + chunk] = all;
    }
}

// The order of float32 keys as unsigned integers; 0 is a NaN.
__device__ __forceinline__ uint32_t ordered(float key) {
    if (key != key) {
        return 0U;
    }
    uint32_t const bits = key == 0.0F ? 0U : __float_as_uint(key);
    return (bits & 0x80000000U) != 0U ? ~bits : bits | 0x80000000U;
}

// Scores and keys of kTile positions of a row; the threads of a block share it.
template <Normalization kNorm>
__device__ void weigh_tile(Work const& work, int64_t row, int first, float2 const* scales) {
    __shared__ float sums[kGroups][kTile];
    int const column = static_cast<int>(threadIdx.x) % kTile;
    int const group = static_cast<int>(threadIdx.x) / kTile;
    int const n = first + column;
    int64_t const at = row * work.seq_len + n;
    bool const inside = n < work.seq_len;
    bool const visual = inside && __ldg(work.tensors.visual_rows + at) >= 0;
    float sum = 0.0F;
    if (visual) {
        float const* scores = work.tensors.head_scores + row * work.heads * work.seq_len + n;
        for (int start = group; start < work.heads; start += kGroups * kBatch) {
            float value[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                int const head = start + i * kGroups;
                value[i] = head < work.heads ? __ldg(scores + static_cast<int64_t>(head) * work.seq_len) : 0.0F;
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                int const head = start + i * kGroups;
                if (head < work.heads) {
                    float const normal = Statistic<kNorm>::normal(finite_or_zero(value[i]), scales[head]);
                    sum = fmaf(__ldg(work.tensors.head_weights + head), normal, sum);
                }
            }
        }
    }
    sums[group][column] = sum;
    __syncthreads();
    if (group == 0 && inside) {
        float score = 0.0F;
        for (int i = 0; visual && i < kGroups; ++i) {
            score += sums[i][column];
        }
        work.tensors.scores[at] = score;
        float const bias = __ldg(work.tensors.select_bias + at);
        work.keys[at] = ordered(fabsf(bias) >= kDecides ? bias : score + bias);
    }
    __syncthreads();
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
__device__ void choose_digit(uint32_t const* histogram, int shift, uint32_t& prefix, uint32_t& wanted) {
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
__device__ void select_row(uint32_t const* row_keys, int32_t* kept, int seq_len, int num_kept) {
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
        int const shift = 8 * (kPasses - 1 - pass);
        uint32_t const known = pass == 0 ? 0U : kAllLanes << (shift + 8);
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

// grid (1 or ceil(seq_len / kTile), batch)
template <Normalization kNorm, bool kWholeRow>
__global__ void __launch_bounds__(kThreads) weigh_and_select(Work work) {
    __shared__ float2 scales[kMaxHeads];
    __shared__ bool last_of_row;
    int64_t const row = blockIdx.y;
    for (int head = warp_id(); head < work.heads; head += kWarps) {
        int64_t const row_head = row * work.heads + head;
        float2 const all =
            kWholeRow ? statistic_of_positions<kNorm>(work.tensors.head_scores + row_head * work.seq_len,
                                                      work.tensors.visual_rows + row * work.seq_len, 0, work.seq_len)
                      : statistic_of_partials<kNorm>(work.partials + row_head * work.num_chunks, work.num_chunks);
        if (lane_id() == 0) {
            scales[head] = Statistic<kNorm>::scale(all);
        }
    }
    __syncthreads();
    if (kWholeRow) {
        for (int first = 0; first < work.seq_len; first += kTile) {
            weigh_tile<kNorm>(work, row, first, scales);
        }
    } else {
        weigh_tile<kNorm>(work, row, static_cast<int>(blockIdx.x) * kTile, scales);
        __threadfence();  // the keys of this block are seen before its ticket
        __syncthreads();
        if (threadIdx.x == 0) {
            last_of_row = atomicAdd(work.tickets + row, 1U) == gridDim.x - 1;
        }
        __syncthreads();
        if (!last_of_row) {
            return;
        }
        __threadfence();
    }
    select_row(work.keys + row * work.seq_len, work.tensors.kept_indices + row * work.num_kept, work.seq_len,
               work.num_kept);
}

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }
std::size_t aligned(int64_t bytes) { return static_cast<std::size_t>(divide_up(bytes, 256) * 256); }

// An upper bound that grows with seq_len, as chunks themselves do not.
int64_t most_chunks(int64_t seq_len) {
    int64_t const chunks = divide_up(seq_len, kTile);
    return chunks < kMaxChunks ? chunks : kMaxChunks;
}

std::size_t partial_bytes(int64_t batch, int64_t heads, int64_t seq_len) {
    return aligned(batch * heads * most_chunks(seq_len) * static_cast<int64_t>(sizeof(float2)));
}

std::size_t key_bytes(int64_t batch, int64_t seq_len) {
    return aligned(batch * seq_len * static_cast<int64_t>(sizeof(uint32_t)));
}

cudaError_t launch(void (*kernel)(Work), dim3 grid, int threads, Work const& work, cudaStream_t stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, work);
}

template <Normalization kNorm>
cudaError_t launch_all(Work const& work, unsigned batch, cudaStream_t stream) {
    if (work.seq_len <= kOneBlock) {
        return launch(weigh_and_select<kNorm, true>, dim3(1, batch), kThreads, work, stream);
    }
    unsigned const head_blocks = static_cast<unsigned>(divide_up(work.heads, kStatisticThreads / kWarp));
    dim3 const grid(static_cast<unsigned>(work.num_chunks), head_blocks, batch);
    cudaError_t const status = launch(head_statistics<kNorm>, grid, kStatisticThreads, work, stream);
    if (status != cudaSuccess) {
        return status;
    }
    unsigned const tiles = static_cast<unsigned>(divide_up(work.seq_len, kTile));
    return launch(weigh_and_select<kNorm, false>, dim3(tiles, batch), kThreads, work, stream);
}

}  // namespace

std::size_t weighted_topk_workspace_bytes(int64_t batch, int64_t heads, int64_t seq_len) {
    return partial_bytes(batch, heads, seq_len) + key_bytes(batch, seq_len) +
           aligned(batch * static_cast<int64_t>(sizeof(uint32_t)));
}

cudaError_t weighted_topk(Normalization normalization, WeightedTopKTensors const& tensors,
                          WeightedTopKSizes const& sizes, void* workspace, cudaStream_t stream) {
    bool const in_range = sizes.batch >= 0 && sizes.batch <= kMaxBatch && sizes.heads >= 1 &&
                          sizes.heads <= kMaxHeads && sizes.seq_len >= 0 && sizes.seq_len <= kMaxSeqLen &&
                          sizes.num_kept >= 0 && sizes.num_kept <= sizes.seq_len;
    if (!in_range) {
        return cudaErrorInvalidValue;
    }
    if (sizes.batch == 0 || sizes.seq_len == 0) {
        return cudaSuccess;
    }
    // Longer rows have longer chunks, so that every block of the second launch merges few partials.
    int64_t const chunk = divide_up(divide_up(sizes.seq_len, kMaxChunks), kTile) * kTile;
    auto* const bytes = static_cast<unsigned char*>(workspace);
    std::size_t const keys_at = partial_bytes(sizes.batch, sizes.heads, sizes.seq_len);
    Work work{};
    work.tensors = tensors;
    work.partials = reinterpret_cast<float2*>(bytes);
    work.keys = reinterpret_cast<uint32_t*>(bytes + keys_at);
    work.tickets = reinterpret_cast<uint32_t*>(bytes + keys_at + key_bytes(sizes.batch, sizes.seq_len));
    work.heads = static_cast<int>(sizes.heads);
    work.seq_len = static_cast<int>(sizes.seq_len);
    work.num_kept = static_cast<int>(sizes.num_kept);
    work.chunk = static_cast<int>(chunk);
    work.num_chunks = static_cast<int>(divide_up(sizes.seq_len, chunk));
    unsigned const batch = static_cast<unsigned>(sizes.batch);
    switch (normalization) {
        case Normalization::kL2:
            return launch_all<Normalization::kL2>(work, batch, stream);
        case Normalization::kSoftmax:
            return launch_all<Normalization::kSoftmax>(work, batch, stream);
        case Normalization::kMinMax:
            return launch_all<Normalization::kMinMax>(work, batch, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace hawk
