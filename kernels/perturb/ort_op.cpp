// The perturbed linear layer as an operation of ONNX Runtime: y = x (W + c m z)^T + bias.
//
// Node `edgesft::PerturbedLinear`, attributes `tensor` (id of the weight) and `row` (of the layer in the two mask
// tables). Inputs:
//   x (k n, ..., in) float32: k equal groups of rows, one a direction; W (out, in) float32, which is only read
//   shifts (k, 3) int64: seed, law (0 gaussian, 1 rademacher, 2 low-rank) and rank; scale (k,) float32: c, 0: none
//   range (layers, 2) float32: low, high; choice (layers, 2) int64: keep, seed of the mask
//   bias (out,) float32, optional
// Group j meets W + scale[j] m z_j. A strip of output rows is perturbed for all groups while it is in the cache,
// noise is drawn once for neighbours of one seed, and W is read from memory once. The numbers are those of
// noise.h; the sum over `in` is in an order of its own.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../ort_api.h"
#include "noise.h"

namespace {

using namespace edgesft;

constexpr int64_t LOW_RANK = 2;
constexpr uint32_t LEFT = 0x75, RIGHT = 0x76;  // u and v of a low-rank direction have ids of their own
constexpr int64_t STRIP_BYTES = 1 << 18;       // one perturbed strip: a quarter or less of a second-level cache
constexpr int MANY = 16;                       // groups that are perturbed side by side at most

// ---------------------------------------------------------------- product

#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 12;  // of W in a tile; with two vectors of x: 24 of 32 registers
#elif defined(__AVX2__)
constexpr int WIDTH = 8, ROWS = 6;
#else
constexpr int WIDTH = 4, ROWS = 12;
#endif
constexpr int PANEL = 2 * WIDTH;  // rows of x side by side
constexpr int DEPTH = 256;        // of a panel that stays in the first-level cache
constexpr int MOST = 10 * ROWS;   // output rows of a strip
constexpr int FEW = 4;            // rows of x: up to here dot products along memory, without a panel
typedef float Vector __attribute__((vector_size(4 * WIDTH)));

inline Vector load(const float* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline Vector spread(float x) {
#if defined(__AVX512F__)
    return (Vector)_mm512_set1_ps(x);
#elif defined(__AVX2__)
    return (Vector)_mm256_set1_ps(x);
#elif defined(__aarch64__)
    return (Vector)vdupq_n_f32(x);
#else
    return Vector{x, x, x, x};
#endif
}

// a b + c, fused where the machine can: contraction is off for the sake of the noise, so it is asked for.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// x (rows, inner) turned round: panel p holds rows p PANEL and on as (inner, PANEL), zeros beyond the last.
void pack(const float* x, int64_t rows, int64_t inner, float* to) {
    for (int64_t k = 0; k < inner; ++k)
        for (int64_t i = 0; i < PANEL; ++i) to[k * PANEL + i] = i < rows ? x[i * inner + k] : 0.0f;
}

// to (R, PANEL) += w (R, depth), its rows `inner` apart, times `depth` rows of a panel; its first V vectors.
template <int R, int V>
inline void tile(const float* w, const float* panel, int64_t depth, int64_t inner, float* to) {
    Vector sums[R][V];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sums[i][v] = load(to + i * PANEL + v * WIDTH);
    for (int64_t k = 0; k < depth; ++k) {
        Vector right[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) right[v] = load(panel + k * PANEL + v * WIDTH);
#pragma GCC unroll 16
        for (int i = 0; i < R; ++i) {
            const Vector left = spread(w[i * inner + k]);
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) sums[i][v] = multiply_add(left, right[v], sums[i][v]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) store(to + i * PANEL + v * WIDTH, sums[i][v]);
}

// y (rows, columns), its rows `stride` apart, = panel^T w^T + bias, w (columns, inner); rows <= PANEL,
// columns <= MOST.
template <int V>
void multiply(const float* panel, const float* w, const float* bias, float* y, int64_t rows, int64_t columns,
              int64_t inner, int64_t stride) {
    alignas(64) float sums[MOST * PANEL];
    for (int64_t j = 0; j < columns; ++j) std::fill_n(sums + j * PANEL, PANEL, bias ? bias[j] : 0.0f);
    for (int64_t k = 0; k < inner; k += DEPTH) {
        const int64_t depth = std::min<int64_t>(DEPTH, inner - k);
        int64_t j = 0;
        for (; j + ROWS <= columns; j += ROWS)
            tile<ROWS, V>(w + j * inner + k, panel + k * PANEL, depth, inner, sums + j * PANEL);
        for (; j < columns; ++j) tile<1, V>(w + j * inner + k, panel + k * PANEL, depth, inner, sums + j * PANEL);
    }
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) y[i * stride + j] = sums[j * PANEL + i];
}

// The same for one row of x, along memory.
void multiply_row(const float* x, const float* w, const float* bias, float* y, int64_t columns, int64_t inner) {
    for (int64_t j = 0; j < columns; ++j, w += inner) {
        Vector sums[4] = {};
        int64_t k = 0;
        for (; k + 4 * WIDTH <= inner; k += 4 * WIDTH)
            for (int v = 0; v < 4; ++v)
                sums[v] = multiply_add(load(x + k + v * WIDTH), load(w + k + v * WIDTH), sums[v]);
        float part[WIDTH];
        store(part, (sums[0] + sums[1]) + (sums[2] + sums[3]));
        for (; k < inner; ++k) part[k % WIDTH] += x[k] * w[k];
        for (int half = WIDTH / 2; half; half /= 2)
            for (int i = 0; i < half; ++i) part[i] += part[i + half];
        y[j] = part[0] + (bias ? bias[j] : 0.0f);
    }
}

// ---------------------------------------------------------------- noise

struct Direction {
    uint64_t seed;
    int64_t law, rank;
    float scale;
    std::vector<float> left, right;  // of a low-rank one: u (out, rank) and v, as (rank, in)

    bool same(const Direction& other) const {
        return seed == other.seed && law == other.law && rank == other.rank;
    }
};

struct Rule {
    float low, high;
    int64_t keep;
    uint64_t seed;
};

std::vector<float> gaussians(const Key& key, uint32_t tensor, int64_t count) {
    std::vector<float> all(static_cast<size_t>((count + PIECE - 1) / PIECE * PIECE));
    for (int64_t at = 0; at < count; at += PIECE) normals(key, tensor, static_cast<uint64_t>(at / 4), &all[at]);
    return all;
}

void prepare(Direction& d, uint32_t tensor, int64_t out, int64_t in) {
    if (d.law != LOW_RANK || d.scale == 0.0f) return;
    const Key key(d.seed);
    d.left = gaussians(key, tensor ^ LEFT, out * d.rank);
    const std::vector<float> v = gaussians(key, tensor ^ RIGHT, in * d.rank);
    d.right.resize(static_cast<size_t>(in * d.rank));
    for (int64_t i = 0; i < in; ++i)
        for (int64_t r = 0; r < d.rank; ++r) d.right[r * in + i] = v[i * d.rank + r];
}

// One strip of rows of a weight under several directions.
class Strip {
  public:
    Strip(const float* weight, uint32_t tensor, const Rule& rule, int64_t in)
        : weight_(weight), tensor_(tensor), rule_(rule), in_(in), mask_(rule.seed) {}

    // to[j] (last - first rows, in) = W + scale m z of direction j; `to[j]` is skipped where it is null.
    void perturb(const Direction* directions, int count, int64_t first, int64_t last, float* const* to) {
        const int64_t start = first * in_, stop = last * in_;
        for (int j = 0; j < count;) {
            int end = j + 1;  // neighbours of one seed share its noise
            while (end < count && directions[end].same(directions[j])) ++end;
            if (std::any_of(to + j, to + end, [](const float* each) { return each != nullptr; }))
                together(directions, j, end, start, stop, to);
            j = end;
        }
    }

  private:
    void together(const Direction* directions, int begin, int end, int64_t start, int64_t stop, float* const* to) {
        const Key key(directions[begin].seed);
        alignas(64) float z[PIECE];
        alignas(64) int32_t in_mask[PIECE];
        for (int64_t piece = start / PIECE * PIECE; piece < stop; piece += PIECE) {
            const int64_t from = std::max(piece, start), until = std::min(piece + PIECE, stop);
            const int a = static_cast<int>(from - piece), count = static_cast<int>(until - from);
            unit(key, directions[begin], piece, from, until, z);
            const float* w = weight_ + from;
            masked(w, piece, a, count, in_mask);
            for (int j = begin; j < end; ++j) {
                if (to[j] == nullptr) continue;
                float* out = to[j] + (from - start);
                const float scale = directions[j].scale;
#pragma omp simd
                for (int i = 0; i < count; ++i) {
                    const float moved = w[i] + z[a + i] * scale;
                    out[i] = in_mask[i] ? moved : w[i];
                }
            }
        }
    }

    void masked(const float* w, int64_t piece, int a, int count, int32_t* in_mask) const {
        const float low = rule_.low, high = rule_.high;
#pragma omp simd
        for (int i = 0; i < count; ++i) {
            const float size = std::fabs(w[i]);
            in_mask[i] = (size >= low) & (size <= high);
        }
        if (rule_.keep >= 256) return;
        uint8_t bytes[PIECE];
        mask_bytes(mask_, tensor_, static_cast<uint64_t>(piece / 16), PIECE / 16, bytes);
        for (int i = 0; i < count; ++i) in_mask[i] &= bytes[a + i] < rule_.keep;
    }

    // z of the entries of one piece; of a low-rank direction those in [from, until) only.
    void unit(const Key& key, const Direction& d, int64_t piece, int64_t from, int64_t until, float* z) const {
        if (d.law == static_cast<int64_t>(GAUSSIAN)) {
            normals(key, tensor_, static_cast<uint64_t>(piece / 4), z);
        } else if (d.law == static_cast<int64_t>(RADEMACHER)) {
            uint32_t words[PIECE / 32];
            signs(key, tensor_, static_cast<uint64_t>(piece / 128), PIECE / 128, words);
            for (int i = 0; i < PIECE; i += 32)
#pragma omp simd
                for (int j = 0; j < 32; ++j) z[i + j] = signed_by(1.0f, words[i / 32], j);
        } else {
            const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(d.rank)));
            for (int64_t i = from; i < until; ++i) {
                const int64_t row = i / in_, column = i % in_;
                const float* u = d.left.data() + row * d.rank;
                const float* v = d.right.data() + column;
                float sum = u[0] * v[0];
                for (int64_t r = 1; r < d.rank; ++r) sum = sum + u[r] * v[r * in_];
                z[i - piece] = sum * norm;
            }
        }
    }

    const float* weight_;
    uint32_t tensor_;
    Rule rule_;
    int64_t in_;
    Key mask_;
};

// ---------------------------------------------------------------- the operation

struct Kernel {
    ort::Api api;
    int64_t tensor = 0, row = 0;
};

struct Tensor {
    const float* floats() const { return static_cast<const float*>(data); }
    const int64_t* integers() const { return static_cast<const int64_t*>(data); }
    int64_t count(size_t from = 0) const {
        int64_t n = 1;
        for (size_t i = from; i < sizes.size(); ++i) n *= sizes[i];
        return n;
    }

    void* data = nullptr;
    std::vector<int64_t> sizes;
};

struct Job {
    const float *x, *weight, *bias;
    float *y, *packed;              // packed: the panels of x, group after group; null for few rows
    int64_t rows, in, out, height;  // rows: of x in a group; height: output rows of a strip
    uint32_t tensor;
    Rule rule;
    std::vector<Direction> directions;
};

int64_t panels(const Job& job) { return (job.rows + PANEL - 1) / PANEL; }  // of one group

struct Buffer {
    std::vector<float> memory;

    float* have(size_t count) {
        if (memory.size() < count) memory.resize(count);
        return memory.data();
    }
};

void one_panel(void* what, size_t number) {
    const Job& job = *static_cast<const Job*>(what);
    const int64_t each = panels(job), group = static_cast<int64_t>(number) / each;
    const int64_t first = static_cast<int64_t>(number) % each * PANEL;
    pack(job.x + (group * job.rows + first) * job.in, std::min<int64_t>(PANEL, job.rows - first), job.in,
         job.packed + static_cast<int64_t>(number) * PANEL * job.in);
}

// Output rows first .. last - 1 of one group; w: those rows of its weight.
void products(const Job& job, int64_t group, const float* w, int64_t first, int64_t last) {
    const float* bias = job.bias ? job.bias + first : nullptr;
    for (int64_t i = 0; i < job.rows; i += job.packed ? PANEL : 1) {
        const int64_t at = group * job.rows + i, left = std::min<int64_t>(PANEL, job.rows - i);
        float* y = job.y + at * job.out + first;
        if (!job.packed) {
            multiply_row(job.x + at * job.in, w, bias, y, last - first, job.in);
            continue;
        }
        const float* panel = job.packed + (group * panels(job) + i / PANEL) * PANEL * job.in;
        if (left > WIDTH)
            multiply<2>(panel, w, bias, y, left, last - first, job.in, job.out);
        else
            multiply<1>(panel, w, bias, y, left, last - first, job.in, job.out);
    }
}

void one_strip(void* what, size_t number) {
    const Job& job = *static_cast<const Job*>(what);
    static thread_local Buffer buffer;  // kept between the layers and the steps
    const int64_t first = static_cast<int64_t>(number) * job.height;
    const int64_t last = std::min(first + job.height, job.out);
    const int64_t size = job.height * job.in;
    const int groups = static_cast<int>(job.directions.size());
    Strip strip(job.weight, job.tensor, job.rule, job.in);
    for (int begin = 0; begin < groups; begin += MANY) {
        const int count = std::min(MANY, groups - begin);
        const Direction* directions = job.directions.data() + begin;
        float* to[MANY];
        int moved = 0;
        for (int j = 0; j < count; ++j) moved += directions[j].scale != 0.0f;
        float* memory = buffer.have(static_cast<size_t>(moved * size));
        for (int j = 0, n = 0; j < count; ++j) to[j] = directions[j].scale != 0.0f ? memory + n++ * size : nullptr;
        strip.perturb(directions, count, first, last, to);
        for (int j = 0; j < count; ++j)
            products(job, begin + j, to[j] ? to[j] : job.weight + first * job.in, first, last);
    }
}

ort::Status* get(const ort::Api& api, const void* context, size_t index, Tensor& to) {
    const void* value = nullptr;
    EDGESFT_TRY(api.input(context, index, &value));
    if (value == nullptr) return nullptr;  // left out
    void* info = nullptr;
    size_t rank = 0;
    EDGESFT_TRY(api.info(value, &info));
    ort::Status* failed = api.rank(info, &rank);
    if (!failed) {
        to.sizes.resize(rank);
        failed = api.sizes(info, to.sizes.data(), rank);
    }
    api.release_info(info);
    if (failed) return failed;
    return api.data(value, &to.data);
}

const char* wrong(const Kernel& kernel, const Tensor* in) {
    const Tensor &x = in[0], &w = in[1], &shifts = in[2], &scale = in[3], &range = in[4], &choice = in[5];
    if (x.sizes.empty() || w.sizes.size() != 2 || x.sizes.back() != w.sizes[1])
        return "the last axis of `x` is not the `in` of the weight (out, in)";
    const int64_t groups = scale.count();
    if (scale.sizes.size() != 1 || groups < 1 || x.sizes.size() < 2 || x.sizes[0] % groups)
        return "the first axis of `x` is not as many equal groups as there are scales";
    if (shifts.sizes != std::vector<int64_t>{groups, 3}) return "`shifts` is not (groups, 3)";
    for (const Tensor* table : {&range, &choice})
        if (table->sizes.size() != 2 || table->sizes[1] != 2 || kernel.row >= table->sizes[0])
            return "a mask table is not (layers, 2)";
    if (in[6].data && in[6].sizes != std::vector<int64_t>{w.sizes[0]}) return "`bias` is not (out,)";
    for (int64_t j = 0; j < groups; ++j) {
        const int64_t law = shifts.integers()[3 * j + 1], rank = shifts.integers()[3 * j + 2];
        if (law < 0 || law > LOW_RANK || (law == LOW_RANK && (rank < 1 || rank > 4096)))
            return "an unknown law or rank";
    }
    return nullptr;
}

ort::Status* run(Kernel& kernel, void* context) {
    const ort::Api& api = kernel.api;
    Tensor in[7];
    size_t given = 0;
    EDGESFT_TRY(api.inputs(context, &given));
    for (size_t i = 0; i < std::min<size_t>(given, 7); ++i) EDGESFT_TRY(get(api, context, i, in[i]));
    if (const char* why = wrong(kernel, in)) return api.status(ort::INVALID_ARGUMENT, why);

    const Tensor &x = in[0], &w = in[1];
    Job job{};
    job.x = x.floats();
    job.weight = w.floats();
    job.bias = in[6].floats();
    job.out = w.sizes[0];
    job.in = w.sizes[1];
    job.tensor = static_cast<uint32_t>(kernel.tensor);
    const float* range = in[4].floats() + 2 * kernel.row;
    const int64_t* choice = in[5].integers() + 2 * kernel.row;
    job.rule = Rule{range[0], range[1], choice[0], static_cast<uint64_t>(choice[1])};
    const int64_t groups = in[3].count(), rows = job.in ? x.count() / job.in : 0;
    job.rows = rows / groups;
    for (int64_t j = 0; j < groups; ++j) {
        const int64_t* shift = in[2].integers() + 3 * j;
        const float scale = job.rule.keep > 0 ? in[3].floats()[j] : 0.0f;  // an empty mask moves nothing
        job.directions.push_back({static_cast<uint64_t>(shift[0]), shift[1], shift[2], scale, {}, {}});
        prepare(job.directions.back(), job.tensor, job.out, job.in);
    }

    std::vector<int64_t> sizes = x.sizes;
    sizes.back() = job.out;
    void *value = nullptr, *data = nullptr;
    EDGESFT_TRY(api.output(context, 0, sizes.data(), sizes.size(), &value));
    EDGESFT_TRY(api.data(value, &data));
    job.y = static_cast<float*>(data);
    if (rows == 0 || job.out == 0) return nullptr;
    const int64_t fit = STRIP_BYTES / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(job.in, 1);
    job.height = std::min<int64_t>(std::max<int64_t>(fit / ROWS * ROWS, ROWS), MOST);
    static thread_local Buffer packed;  // of the thread that runs the session: kept between layers and steps
    if (job.rows > FEW) {
        const size_t count = static_cast<size_t>(groups * panels(job));
        job.packed = packed.have(count * static_cast<size_t>(PANEL * job.in));
        EDGESFT_TRY(api.parallel(context, one_panel, count, &job));
    }
    const size_t strips = static_cast<size_t>((job.out + job.height - 1) / job.height);
    return api.parallel(context, one_strip, strips, &job);
}

ort::Status* create(const ort::CustomOp*, const void* table, const void* info, void** made) {
    const ort::Api api(static_cast<const void* const*>(table));
    Kernel* kernel = new (std::nothrow) Kernel{api};
    if (kernel == nullptr) return api.status(ort::FAIL, "out of memory");
    ort::Status* failed = api.integer(info, "tensor", &kernel->tensor);
    if (!failed) failed = api.integer(info, "row", &kernel->row);
    if (!failed && kernel->row < 0) failed = api.status(ort::INVALID_ARGUMENT, "`row` is negative");
    if (failed) {
        delete kernel;
        return failed;
    }
    *made = kernel;
    return nullptr;
}

ort::Status* compute(void* what, void* context) {
    Kernel& kernel = *static_cast<Kernel*>(what);
    try {
        return run(kernel, context);
    } catch (const std::bad_alloc&) {
        return kernel.api.status(ort::FAIL, "out of memory");
    }
}

int input_type(const ort::CustomOp*, size_t index) { return index == 2 || index == 5 ? ort::INT64 : ort::FLOAT; }
int input_kind(const ort::CustomOp*, size_t index) { return index == 6 ? ort::OPTIONAL : ort::REQUIRED; }
int zero(const ort::CustomOp*) { return 0; }

ort::CustomOp operation() {
    ort::CustomOp op{};
    op.version = ort::VERSION;
    op.name = [](const ort::CustomOp*) { return "PerturbedLinear"; };
    op.provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
    op.input_type = input_type;
    op.inputs = [](const ort::CustomOp*) -> size_t { return 7; };
    op.output_type = [](const ort::CustomOp*, size_t) { return ort::FLOAT; };
    op.outputs = [](const ort::CustomOp*) -> size_t { return 1; };
    op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    op.input_kind = input_kind;
    op.output_kind = [](const ort::CustomOp*, size_t) { return ort::REQUIRED; };
    op.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
    op.input_arity = op.input_homogeneity = op.output_arity = op.output_homogeneity = zero;
    op.create_checked = create;
    op.compute_checked = compute;
    op.first_version = [](const ort::CustomOp*) { return 1; };
    op.last_version = [](const ort::CustomOp*) { return 0x7FFFFFFF; };
    return op;
}

}  // namespace

extern "C" ort::Status* RegisterCustomOps(void* options, const ort::Base* base) {
    const void* const* table = base->table(ort::VERSION);
    if (table == nullptr) return nullptr;  // older than 1.17: the session then says that it lacks the operation
    const ort::Api api(table);
    static const ort::CustomOp op = operation();
    static void* domain = nullptr;  // lives as long as the library, as sessions need it
    if (domain == nullptr) {
        void* made = nullptr;
        EDGESFT_TRY(api.domain("edgesft", &made));
        EDGESFT_TRY(api.add(made, &op));
        domain = made;
    }
    return api.use(options, domain);
}
