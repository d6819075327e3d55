// Enough of CUDA's execution model to run the plugin's kernel file, unmodified, on a CPU:
//   g++ -std=c++17 -U_FORTIFY_SOURCE -I tests/plugins/cuda_on_cpu -x c++ weighted_topk_kernel.cu
// (without the -U, a distribution that fortifies takes the change of stacks for an attack)
//
// Blocks run one after another, in a shuffled order. The threads of a block are fibers of one CPU thread; which
// warps go on is drawn anew at every turn, so that a missing barrier shows; the address of the stream, which is
// nothing else here, is the seed, so that it shows again. A barrier or shuffle that some threads never reach ends the
// program: on a GPU it hangs or is undefined. What this cannot show: the order of memory between blocks that run at
// once, and speed.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static  // one block at a time; holds what the block before it left, as on a GPU

using std::min;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = struct CUstream_st*;
struct float2 {
    float x, y;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    void* attrs;
    unsigned numAttrs;
};

inline char const* cudaGetErrorString(cudaError_t status) {
    return status == cudaSuccess ? "no error" : "invalid argument";
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStackBytes = std::size_t{64} << 10;

struct Barrier {
    unsigned threads = 0;
    unsigned arrived = 0;
    unsigned long round = 0;
};

struct Fiber {
    jmp_buf state;
    bool started = false;
    bool finished = false;
    Barrier* waits_at = nullptr;
    unsigned long until_round = 0;
    unsigned exchanges = 0;  // warp operations so far: their slots alternate
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Barrier> warps;
    Barrier all;
    std::vector<uint32_t> slots[2];
    std::function<void()> body;
    unsigned current = 0;
    jmp_buf scheduler;
    ucontext_t entry;
    ucontext_t origin;
};

inline Block block;

inline std::mt19937 random;

[[noreturn]] inline void fail(char const* why) {
    std::fprintf(stderr, "cuda_on_cpu: %s (block %u,%u,%u thread %u)\n", why, blockIdx.x, blockIdx.y, blockIdx.z,
                 block.current);
    std::abort();
}

inline unsigned char* stack_of(unsigned thread) {
    static unsigned char* const stacks = [] {
        void* const memory = mmap(nullptr, 1024 * kStackBytes, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return memory == MAP_FAILED ? nullptr : static_cast<unsigned char*>(memory);
    }();
    if (stacks == nullptr) {
        fail("no memory for the stacks");
    }
    return stacks + thread * kStackBytes;
}

inline void enter_fiber() {
    block.body();
    block.fibers[block.current].finished = true;
    _longjmp(block.scheduler, 1);
}

// Runs a fiber until it waits or returns. setjmp and longjmp change stacks without a system call; only the first
// entry of a fiber needs makecontext.
__attribute__((noinline)) inline void resume(unsigned thread) {
    Fiber& fiber = block.fibers[thread];
    block.current = thread;
    threadIdx.x = thread;
    if (_setjmp(block.scheduler) != 0) {
        return;
    }
    if (fiber.started) {
        _longjmp(fiber.state, 1);
    }
    fiber.started = true;
    getcontext(&block.entry);
    block.entry.uc_stack.ss_sp = stack_of(thread);
    block.entry.uc_stack.ss_size = kStackBytes;
    block.entry.uc_link = nullptr;
    makecontext(&block.entry, enter_fiber, 0);
    setcontext(&block.entry);
}

__attribute__((noinline)) inline void wait_at(Barrier& barrier) {
    if (++barrier.arrived == barrier.threads) {
        barrier.arrived = 0;
        ++barrier.round;
        return;
    }
    Fiber& fiber = block.fibers[block.current];
    fiber.waits_at = &barrier;
    fiber.until_round = barrier.round + 1;
    if (_setjmp(fiber.state) == 0) {
        _longjmp(block.scheduler, 1);
    }
}

inline void run_block(unsigned threads) {
    block.fibers.assign(threads, Fiber{});
    block.all = {threads, 0, 0};
    block.warps.assign(threads / kWarp, Barrier{kWarp, 0, 0});
    block.slots[0].assign(threads, 0);
    block.slots[1].assign(threads, 0);
    unsigned left = threads;
    for (bool everyone = false; left > 0;) {
        bool moved = false;
        uint32_t const warps = everyone ? ~0U : random();
        unsigned const offset = random(), step = random() | 1U;
        for (unsigned turn = 0; turn < threads; ++turn) {
            unsigned const thread = (offset + turn * step) % threads;
            Fiber& fiber = block.fibers[thread];
            bool const waits = fiber.waits_at != nullptr && fiber.waits_at->round < fiber.until_round;
            if (fiber.finished || waits || ((warps >> (thread / kWarp % 32)) & 1U) == 0) {
                continue;
            }
            fiber.waits_at = nullptr;
            resume(thread);
            moved = true;
            left -= fiber.finished ? 1U : 0U;
        }
        if (!moved && everyone) {
            fail("threads wait at a barrier or shuffle that others never reach");
        }
        everyone = !moved;
    }
}

template <typename Value>
Value exchange(unsigned mask, Value own, unsigned lane) {
    static_assert(sizeof(Value) == sizeof(uint32_t), "32-bit values");
    if (mask != 0xffffffffU) {
        fail("a warp operation of some lanes only");
    }
    unsigned const thread = block.current;
    auto& slots = block.slots[block.fibers[thread].exchanges++ % 2];
    std::memcpy(&slots[thread], &own, sizeof own);
    wait_at(block.warps[thread / kWarp]);
    Value other;
    std::memcpy(&other, &slots[thread / kWarp * kWarp + lane], sizeof other);
    return other;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait_at(cuda_on_cpu::block.all); }
inline void __syncwarp(unsigned mask) { cuda_on_cpu::exchange(mask, 0U, 0); }
inline void __threadfence() {}

template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value own, unsigned distance) {
    return cuda_on_cpu::exchange(mask, own, threadIdx.x % cuda_on_cpu::kWarp ^ distance);
}

template <typename Value>
Value __shfl_up_sync(unsigned mask, Value own, unsigned distance) {
    unsigned const lane = threadIdx.x % cuda_on_cpu::kWarp;
    return cuda_on_cpu::exchange(mask, own, lane >= distance ? lane - distance : lane);
}

inline unsigned __ballot_sync(unsigned mask, bool own) {
    auto& block = cuda_on_cpu::block;
    unsigned const turn = block.fibers[block.current].exchanges % 2;
    cuda_on_cpu::exchange(mask, own ? 1U : 0U, 0);
    unsigned const first = threadIdx.x / cuda_on_cpu::kWarp * cuda_on_cpu::kWarp;
    unsigned lanes = 0;
    for (unsigned lane = 0; lane < cuda_on_cpu::kWarp; ++lane) {
        lanes |= block.slots[turn][first + lane] << lane;
    }
    return lanes;
}

inline uint32_t atomicAdd(uint32_t* at, uint32_t value) {
    uint32_t const before = *at;
    *at += value;
    return before;
}

template <typename Value>
Value __ldg(Value const* at) {
    return *at;
}
template <typename Value>
Value __ldcg(Value const* at) {
    return *at;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(cudaLaunchConfig_t const* config, void (*kernel)(Parameters...),
                               Arguments const&... arguments) {
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    bool const power_of_two = (blockDim.x & (blockDim.x - 1)) == 0;  // as the shuffled turns need
    if (blockDim.x < cuda_on_cpu::kWarp || blockDim.x > 1024 || !power_of_two || blockDim.y * blockDim.z != 1) {
        return cudaErrorInvalidValue;
    }
    cuda_on_cpu::block.body = [&] { kernel(arguments...); };
    cuda_on_cpu::random.seed(static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(config->stream)));
    std::vector<unsigned> order(gridDim.x * gridDim.y * gridDim.z);
    std::iota(order.begin(), order.end(), 0U);
    std::shuffle(order.begin(), order.end(), cuda_on_cpu::random);
    for (unsigned const index : order) {
        blockIdx = dim3(index % gridDim.x, index / gridDim.x % gridDim.y, index / gridDim.x / gridDim.y);
        cuda_on_cpu::run_block(blockDim.x);
    }
    return cudaSuccess;
}
