// The two launches of hawk::WeightedTopK (the rule is in weighted_topk_kernel.cuh):
//
//   head_statistics  a warp a head and chunk of positions: what the norm needs, as partial results
//   weigh_and_select a block a tile of positions: merges the partials, weighs, makes keys; the block of a row
//                    that finishes last then selects the row
//
// A row of up to kOneBlock positions takes the second alone: its block makes the statistics itself.
#include "weighted_topk_kernel.cuh"

#include "head_statistic.cuh"
#include "row_selection.cuh"
#include "warp.cuh"

namespace hawk {
namespace {

constexpr int kStatisticThreads = 256;
constexpr int kTile = 256;                 // positions that a block weighs at a time
constexpr int kGroups = kThreads / kTile;  // threads that share a position, each with every kGroups-th head
constexpr float kDecides = 3.0e38F;        // a bias of this size decides alone
constexpr int kOneBlock = 512;             // positions up to which a launch less is worth more than more blocks

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

// Scores and keys of kTile positions of a row; the threads of a block share it, and meet before the next.
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
            __syncthreads();  // before the next tile takes its sums, or the selection its keys
        }
    } else {
        weigh_tile<kNorm>(work, row, static_cast<int>(blockIdx.x) * kTile, scales);
        // All keys of this block are written before its ticket is.
        __threadfence();
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
                          sizes.heads <= kMaxHeads && sizes.seq_len <= kMaxSeqLen && sizes.num_kept >= 1 &&
                          sizes.num_kept <= sizes.seq_len;
    if (!in_range) {
        return cudaErrorInvalidValue;
    }
    if (sizes.batch == 0) {
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
