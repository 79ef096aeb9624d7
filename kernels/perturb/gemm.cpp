// y_j = x_j (W + scale_j m z_j)^T + bias for groups j of the rows of x, in float32, bfloat16 or int8.
//
// x is packed once. Then every thread takes blocks of output rows: it reads that part of W once, draws each noise
// once, writes the rows of one perturbed weight into its cache and multiplies the groups that see it. Products
// are summed in float32 with fused multiply-adds (int8: in int32), in an order of their own; the perturbed
// weights have the bits of cpu.cpp.
//
// Plain C interface, loaded through ctypes. On a CPU without the instructions nothing is offered.

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__F16C__)

#include "gemm.h"
#include "gemm_tiles.h"

#include <algorithm>
#include <new>
#include <type_traits>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(EDGESFT_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace edgesft {
namespace gemm {
namespace {

constexpr int64_t MOST = 192;  // rows of W in a block

// Whether the kernel of the system lets this process use the tile registers. It has to be asked once.
bool tiles_allowed() {
#if defined(EDGESFT_AMX) && defined(__linux__)
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
    return allowed;
#else
    return false;
#endif
}

// 16 * vectors rows of x that one micro-kernel sees; those past `rows` are zeros.
struct Panel {
    int64_t row, rows, vector;  // first row of x; first column of 16 rows in the packed x
    int vectors;
};

// A perturbed weight, and the panels that are multiplied by it.
struct Weight {
    Group group;
    std::vector<size_t> panels;
};

// How a call is cut up.
struct Plan {
    std::vector<Panel> panels;
    std::vector<Weight> weights;     // those of one noise follow each other
    int64_t vectors = 0;             // columns of 16 rows in the packed x
    int64_t depth = 0;               // units of a packed row
    int64_t length = 0, parts = 0;   // entries along `in` that are multiplied at a time, and how often
    int64_t height = 0, stride = 0;  // rows of W in a block, units from one to the next
    bool masked = false, tiles = false;
};

bool same_noise(const Group& a, const Group& b) { return a.law == b.law && (a.law == PLAIN || a.seed == b.seed); }

bool less(const Group& a, const Group& b) {
    if (a.law != b.law || a.law == PLAIN) return a.law < b.law;
    return a.seed != b.seed ? a.seed < b.seed : a.scale < b.scale;
}

// At most 48 rows a panel (tile registers: 32). No panel of 16 next to one of 48: two of 32 are faster.
int width_of(int64_t left, bool tiles) {
    if (tiles) return left >= 2 ? 2 : 1;
    return left == 4 || left == 2 ? 2 : left >= 3 ? 3 : 1;
}

// Cut the rows of x into panels, and find what they are multiplied by.
void make_panels(const Job& job, Plan& plan) {
    std::vector<int64_t> order;
    for (int64_t group = 0; group < job.count; ++group) order.push_back(group);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return less(job.groups[a], job.groups[b]); });
    for (const int64_t index : order) {
        const Group& group = job.groups[index];
        if (plan.weights.empty() || less(plan.weights.back().group, group)) plan.weights.push_back({group, {}});
        for (int64_t row = 0; row < job.rows;) {
            const int vectors = width_of((job.rows - row + 15) / 16, plan.tiles);
            plan.weights.back().panels.push_back(plan.panels.size());
            plan.panels.push_back(
                {index * job.rows + row, std::min<int64_t>(job.rows - row, 16 * vectors), plan.vectors, vectors});
            plan.vectors += vectors;
            row += 16 * vectors;
        }
    }
}

// Every block reads all of the packed x, so it is high where x leaves the L2 cache; a few blocks for each thread.
int64_t height_of(const Job& job, const Plan& plan) {
    const int64_t share = (job.out + 3 * job.threads - 1) / (3 * job.threads);
    if (plan.tiles) {
        const bool large = 64 * plan.vectors * plan.depth > 2 << 20;
        return std::min<int64_t>(large ? MOST : 64, up(share, 32));
    }
    const int64_t room = std::max<int64_t>(16, 73728 / plan.length / 16 * 16);
    return std::min<int64_t>(std::min<int64_t>(96, room), up(share, 16));
}

template <int PER>
Plan make_plan(const Job& job) {
    Plan plan;
    plan.tiles = PER == 4 || (PER == 2 && tiles_allowed());
    plan.masked = job.low > 0.0f || !(job.high >= HUGE_VALF) || job.keep < 256;
    make_panels(job, plan);
    // A part of a perturbed row block and its noise stay in the L2 cache.
    const bool normal = std::any_of(plan.weights.begin(), plan.weights.end(),
                                    [](const Weight& each) { return each.group.law == NORMAL; });
    const int64_t most = PER == 1 ? (normal ? 2048 : 768) : PER == 2 ? 1536 : 3072;
    plan.parts = (job.in + most - 1) / most;
    plan.length = plan.parts == 1 ? job.in : up((job.in + plan.parts - 1) / plan.parts, 256);
    plan.parts = (job.in + plan.length - 1) / plan.length;
    plan.depth = PER == 1 ? job.in : up(job.in, 16 * PER) / PER;
    plan.stride = up(plan.length, 16 * PER) / PER + 16;
    plan.height = height_of(job, plan);
    return plan;
}

// What a thread keeps from call to call.
struct Scratch {
    Memory weight, direction, sums, active, random, at;
    Noise noise;
};

// sums = or += a part of W (perturbed) times a panel of the packed x.
template <int PER>
void multiply(const Plan& plan, const float* weight, const Panel& panel, const float* packed, const Block& block,
              float* sums, bool add) {
    const auto part_of = [&](const Panel& p) {
        return packed + 16 * (p.vector * plan.depth + block.k / PER * p.vectors);
    };
    const float* const x = part_of(panel);
    const int64_t depth = PER == 1 ? block.length : up(block.length, 16 * PER) / PER;
#if defined(EDGESFT_AMX)
    if (PER != 1 && plan.tiles) {
        constexpr int per = PER == 1 ? 2 : PER;
        auto* const by = panel.vectors == 2 ? tile_amx<per, 2> : tile_amx<per, 1>;
        for (int64_t r = 0; r < block.rows; r += 32)
            by(weight + r * plan.stride, plan.stride, x, depth, sums + r * 16 * panel.vectors, add);
        return;
    }
#endif
#if defined(__AVX512BF16__)
    using Op = typename std::conditional<PER == 1, Float, Half>::type;
#else
    using Op = Float;
#endif
    auto* const by = panel.vectors == 3 ? tile<Op, 3> : panel.vectors == 2 ? tile<Op, 2> : tile<Op, 1>;
    // The next panel comes into the L2 cache meanwhile, a share with every eight rows.
    const float* const ahead = part_of(&panel == &plan.panels.back() ? plan.panels.front() : *(&panel + 1));
    for (int64_t r = 0; r < block.rows; r += 8)
        by(weight + r * plan.stride, plan.stride, x, depth, sums + r * 16 * panel.vectors, add,
           ahead + r / 8 * 4 * depth);
}

// Turn a tile of y^T round and write it. value(row of W, column of 16 rows): what belongs there.
template <class Value>
void finish(const Job& job, const Block& block, const Panel& panel, Value value) {
    for (int v = 0; v < panel.vectors; ++v)
        for (int64_t r = 0; r < block.rows; r += 16) {
            __m512 part[16];
            for (int i = 0; i < 16; ++i) part[i] = value(r + i, v);
            transpose(part);
            const __mmask16 some = first_of(block.rows - r);
            const int64_t to = block.first + r;
            const __m512 bias = job.bias ? _mm512_maskz_loadu_ps(some, job.bias + to) : _mm512_setzero_ps();
            const int64_t count = std::min<int64_t>(16, panel.rows - 16 * v);
            for (int64_t i = 0; i < count; ++i) {
                const __m512 y = job.bias ? _mm512_add_ps(part[i], bias) : part[i];
                const int64_t at = (panel.row + 16 * v + i) * job.out + to;
                if (job.x_type == FLOAT32) {
                    _mm512_mask_storeu_ps(static_cast<float*>(job.y) + at, some, y);
                } else {
                    alignas(32) uint16_t half[16];
#if defined(__AVX512BF16__)
                    put(half, y);
#else
                    alignas(64) float wide[16];
                    _mm512_store_ps(wide, y);
                    for (int j = 0; j < 16; ++j) half[j] = to_bf16(wide[j]);
#endif
                    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(job.y) + at, some,
                                             _mm256_load_si256(reinterpret_cast<const __m256i*>(half)));
                }
            }
        }
}

// `count` perturbed weights of one noise.
template <int TYPE, class To>
void fill_by(const Job& job, const Block& block, const Noise& noise, int law, const float* scales, size_t count,
             const __mmask16* active, To* const* to, int64_t stride) {
    auto* by = fill<TYPE, PLAIN, false, 1, To>;
    if (law == NORMAL && count == 1)
        by = active ? fill<TYPE, NORMAL, true, 1, To> : fill<TYPE, NORMAL, false, 1, To>;
    else if (law == NORMAL)
        by = active ? fill<TYPE, NORMAL, true, 2, To> : fill<TYPE, NORMAL, false, 2, To>;
    else if (law == SIGN && count == 1)
        by = active ? fill<TYPE, SIGN, true, 1, To> : fill<TYPE, SIGN, false, 1, To>;
    else if (law == SIGN)
        by = active ? fill<TYPE, SIGN, true, 2, To> : fill<TYPE, SIGN, false, 2, To>;
    by(job, block, noise, scales, active, to, stride);
}

// The sums of one panel after this part of `in`, written when it is the last.
template <int PER>
void product(const Job& job, const Plan& plan, const Panel& panel, const float* packed, const Block& block,
             const float* weight, float* sums) {
    multiply<PER>(plan, weight, panel, packed, block, sums, block.k > 0);
    if (block.k + block.length < job.in) return;
    const int64_t line = 16 * panel.vectors;
    finish(job, block, panel, [=](int64_t r, int v) { return _mm512_load_ps(sums + r * line + 16 * v); });
}

// The same for 8-bit codes. steps: of the rows of x and of the weight; `direction` null: no noise.
void product_of_codes(const Job& job, const Plan& plan, const Panel& panel, const float* packed, const Block& block,
                      const float* weight, const float* direction, float scale, const float* x_steps,
                      const float* steps, float* sums, float* noisy) {
    multiply<4>(plan, weight, panel, packed, block, sums, block.k > 0);
    if (direction) multiply<4>(plan, direction, panel, packed, block, noisy, block.k > 0);
    if (block.k + block.length < job.in) return;
    const int64_t line = 16 * panel.vectors;
    const float* const of_x = x_steps + 16 * panel.vector;
    finish(job, block, panel, [=](int64_t r, int v) {
        const int64_t at = r * line + 16 * v;
        __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums + at)), _mm512_set1_ps(steps[r]));
        if (direction)
            y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(noisy + at)), _mm512_set1_ps(scale), y);
        return _mm512_mul_ps(y, _mm512_load_ps(of_x + 16 * v));
    });
}

// Output rows [first, first + rows) of every group. Returns whether there was memory.
template <int PER, int TYPE>
bool rows_of(const Job& job, const Plan& plan, const float* packed, const float* x_steps, int64_t first,
             int64_t rows, Scratch& own) {
    const int64_t kept = 16 * plan.height * (plan.parts > 1 ? plan.vectors : 3);  // sums that outlive a panel
    const int64_t size = plan.height * plan.stride;
    float* const sums = own.sums.get<float>(PER == 4 ? 2 * kept : kept);
    float* const weight = own.weight.get<float>(2 * size);
    int64_t* const at = own.at.get<int64_t>(plan.height);
    if (!sums || !weight || !at) return false;
    float steps[MOST] = {}, inverse[MOST] = {};
    if (PER == 4)
        for (int64_t r = 0; r < rows; ++r)
            step_of_row(job.in, [&](int64_t k, __mmask16 some) { return stored<TYPE>(job, first + r, k, some); },
                        steps[r], inverse[r]);
    for (int64_t k = 0; k < job.in; k += plan.length) {
        const Block block{first, rows, k, std::min(plan.length, job.in - k)};
        __mmask16* active = nullptr;
        if (plan.masked && !choose<TYPE>(job, block, own.active, own.random, active)) return false;
        if (PER == 4) quantise<TYPE>(job, block, inverse, reinterpret_cast<int8_t*>(weight), 4 * plan.stride);
        for (size_t i = 0, count; i < plan.weights.size(); i += count) {
            const Group& group = plan.weights[i].group;
            const bool fresh = group.law != PLAIN && (!i || !same_noise(plan.weights[i - 1].group, group));
            const bool pair = PER != 4 && i + 1 < plan.weights.size() && same_noise(group, plan.weights[i + 1].group);
            count = pair ? 2 : 1;
            if (fresh && !own.noise.make(job, block, group, at)) return false;
            const float scales[2] = {group.scale, pair ? plan.weights[i + 1].group.scale : 0.0f};
            if (PER == 1) {
                float* const to[2] = {weight, weight + size};
                fill_by<TYPE>(job, block, own.noise, group.law, scales, count, active, to, plan.stride);
            }
#if defined(__AVX512BF16__)
            if (PER == 2) {
                uint16_t* const to[2] = {reinterpret_cast<uint16_t*>(weight),
                                         reinterpret_cast<uint16_t*>(weight + size)};
                fill_by<TYPE>(job, block, own.noise, group.law, scales, count, active, to, 2 * plan.stride);
            }
#endif
            if (PER == 4 && fresh)
                directions(block, own.noise, group.law, active, reinterpret_cast<int8_t*>(weight + size),
                           4 * plan.stride);
            for (size_t c = 0; c < count; ++c)
                for (const size_t index : plan.weights[i + c].panels) {
                    const Panel& panel = plan.panels[index];
                    float* const to = sums + (plan.parts > 1 ? panel.vector * 16 * plan.height : 0);
                    if (PER == 4)
                        product_of_codes(job, plan, panel, packed, block, weight,
                                         group.law == PLAIN ? nullptr : weight + size,
                                         group.law == NORMAL ? group.scale * (LARGEST / 127) : group.scale, x_steps,
                                         steps, to, to + kept);
                    else
                        product<PER>(job, plan, panel, packed, block, weight + static_cast<int64_t>(c) * size, to);
                }
        }
    }
    return true;
}

template <int PER, int TYPE>
int run(const Job& job) {
    const Plan plan = make_plan<PER>(job);
    thread_local Memory x_memory, step_memory;
    float* const packed = x_memory.get<float>(16 * plan.vectors * plan.depth);
    float* const steps = step_memory.get<float>(16 * plan.vectors);
    if (!packed || !steps) return 1;
    const int64_t blocks = (job.out + plan.height - 1) / plan.height;
    int failed = 0;
#pragma omp parallel num_threads(job.threads) reduction(| : failed) if (job.threads > 1)
    {
        thread_local Scratch own;
        // The panels are the unit: two threads would share cache lines of no panel.
#pragma omp for schedule(static)
        for (size_t p = 0; p < plan.panels.size(); ++p) {
            const Panel& panel = plan.panels[p];
            for (int v = 0; v < panel.vectors; ++v)
                (job.x_type == FLOAT32 ? pack<PER, FLOAT32> : pack<PER, BFLOAT16>)(
                    job, panel.row + 16 * v, std::min<int64_t>(16, panel.rows - 16 * v), plan.depth,
                    packed + 16 * (panel.vector * plan.depth + v), panel.vectors, steps + 16 * (panel.vector + v));
        }
        {
#if defined(EDGESFT_AMX)
            struct Nothing {};
            typename std::conditional<PER == 1, Nothing, Tiles>::type tiles;
            (void)tiles;
#endif
#pragma omp for schedule(dynamic)
            for (int64_t b = 0; b < blocks; ++b)
                failed |= !rows_of<PER, TYPE>(job, plan, packed, steps, b * plan.height,
                                              std::min(plan.height, job.out - b * plan.height), own);
        }
    }
    return failed;
}

template <int PER>
int run_by(const Job& job) {
    switch (job.weight_type) {
        case FLOAT32: return run<PER, FLOAT32>(job);
        case BFLOAT16: return run<PER, BFLOAT16>(job);
        case INT8: return run<PER, INT8>(job);
        default: return run<PER, INT4>(job);
    }
}

}  // namespace
}  // namespace gemm
}  // namespace edgesft

extern "C" {

// Which products there are: 1 float32, 2 bfloat16, 4 int8, 8 with tile registers.
int edgesft_gemm_kinds() {
    int kinds = 1;
#if defined(__AVX512BF16__)
    kinds |= 2;
#endif
    if (edgesft::gemm::tiles_allowed()) kinds |= 2 | 4 | 8;
    return kinds;
}

// kind: 1, 2 or 4. Returns 0, or 1 where memory is short and y is not whole.
int edgesft_gemm(const edgesft::gemm::Job* job, const edgesft::gemm::Group* groups, int kind) {
    using namespace edgesft::gemm;
    Job whole = *job;
    whole.groups = groups;
    try {
        if (kind == 1) return run_by<1>(whole);
#if defined(__AVX512BF16__)
        if (kind == 2) return run_by<2>(whole);
#endif
#if defined(EDGESFT_AMX)
        if (kind == 4) return run_by<4>(whole);
#endif
    } catch (const std::bad_alloc&) {
    }
    return 1;
}

}  // extern "C"

#else

extern "C" {

int edgesft_gemm_kinds() { return 0; }

int edgesft_gemm(const void*, const void*, int) { return 1; }

}  // extern "C"

#endif
