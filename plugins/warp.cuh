// The threads of a block, as every kernel here counts them.
#pragma once

#include <cuda_runtime.h>

namespace hawk {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffU;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

}  // namespace hawk
