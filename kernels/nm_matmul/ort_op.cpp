// Packed matrices as operations of ONNX Runtime, domain `edgesft`. docs/format.md describes stream and scales.
//
// PackedLinear: y = finish(x w^T). Inputs: x (..., columns) float; stream (bytes,) uint8 and scales (count,)
//   float16, both constant; bias (rows,), residual (..., rows) and norm (columns,) float, optional.
//   Attributes: rows, columns, sparse (0 dense, 1 2:4), value (0 int4, 1 int8, 2 fp16, 3 bf16), group (columns, 0:
//   the row), unit (float); level (4: x in int8, 0: as it is), gate (1: strips alternate, y = silu(even) * odd of
//   (..., rows / 2)), epsilon (float) of the norm, version of the format.
// PackedEmbedding: y = rows of w. Inputs: ids (...) int64; stream, scales. The same attributes up to unit, version.
//
// A matrix is copied once, while a kernel is made, onto huge pages: a session's own lie on small ones, which
// halve the bandwidth. Kernels of one initializer share the copy.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "../ort_api.h"
#include "linear.h"

namespace {

using namespace edgesft::nm;

constexpr int64_t FORMAT = 1;

// ---------------------------------------------------------------- streams on huge pages

struct Copy {
    const void *stream, *scales;  // of the session
    void* memory;
    int users;
};

struct Copies {
    std::mutex mutex;
    std::vector<Copy> all;
};

Copies& copies() {
    static Copies* it = new Copies;
    return *it;
}

// A session holds its initializers as long as its kernels, so an address names one of them while it has users.
const uint8_t* share(const Given& given, const Matrix& w) {
    Copies& c = copies();
    const std::lock_guard<std::mutex> lock(c.mutex);
    for (Copy& each : c.all)
        if (each.stream == given.stream && each.scales == given.scales) {
            ++each.users;
            return static_cast<const uint8_t*>(each.memory);
        }
    void* memory = buffer(bytes(w));
    if (memory == nullptr) return nullptr;
    load(given, w, static_cast<uint8_t*>(memory));
    c.all.push_back({given.stream, given.scales, memory, 1});
    return static_cast<const uint8_t*>(memory);
}

void drop(const void* memory) {
    Copies& c = copies();
    const std::lock_guard<std::mutex> lock(c.mutex);
    for (size_t i = 0; i < c.all.size(); ++i)
        if (c.all[i].memory == memory) {
            if (--c.all[i].users == 0) {
                release(c.all[i].memory);
                c.all.erase(c.all.begin() + static_cast<std::ptrdiff_t>(i));
            }
            return;
        }
}

// ---------------------------------------------------------------- kernels

struct Kernel {
    explicit Kernel(const ort::Api& a) : api(a) {}
    Kernel(const Kernel&) = delete;
    Kernel& operator=(const Kernel&) = delete;
    ~Kernel() { drop(w.memory); }

    ort::Api api;
    Matrix w{};
    int64_t level = 4, gate = 0;
    float epsilon = 0.0f;
};

struct Tensor {
    const void* data = nullptr;
    int64_t count = 0;
    int kind = 0;
    const float* floats() const { return static_cast<const float*>(data); }
};

// `sizes` gets the shape.
ort::Status* look(const ort::Api& api, const void* value, Tensor& to, std::vector<int64_t>& sizes) {
    void* info = nullptr;
    size_t rank = 0;
    EDGESFT_TRY(api.info(value, &info));
    ort::Status* failed = api.rank(info, &rank);
    if (!failed) failed = api.kind(info, &to.kind);
    if (!failed) {
        sizes.resize(rank);
        failed = api.sizes(info, sizes.data(), rank);
    }
    api.release_info(info);
    if (failed) return failed;
    to.count = 1;
    for (const int64_t size : sizes) to.count *= size;
    void* data = nullptr;
    EDGESFT_TRY(api.data(value, &data));
    to.data = data;
    return nullptr;
}

ort::Status* refuse(const ort::Api& api, const std::string& why) {
    return api.status(ort::INVALID_ARGUMENT, ("edgesft: " + why).c_str());
}

ort::Status* constant(const ort::Api& api, const void* info, size_t index, int kind, const char* name, Tensor& to) {
    int is = 0;
    const void* value = nullptr;
    std::vector<int64_t> sizes;
    EDGESFT_TRY(api.constant(info, index, &is, &value));
    if (!is || value == nullptr) return refuse(api, std::string("`") + name + "` is not constant");
    EDGESFT_TRY(look(api, value, to, sizes));
    if (to.kind != kind) return refuse(api, std::string("`") + name + "` has another type");
    return nullptr;
}

ort::Status* load(Kernel& kernel, const void* info) {
    const ort::Api& api = kernel.api;
    int64_t version = 0, sparse = 0, value = 0;
    Given given{};
    EDGESFT_TRY(api.integer(info, "version", &version));
    if (version != FORMAT)
        return refuse(api, "this library reads format " + std::to_string(FORMAT) + " and the model has " +
                               std::to_string(version) + ": export it again, or take the library of its edgesft");
    EDGESFT_TRY(api.integer(info, "rows", &given.rows));
    EDGESFT_TRY(api.integer(info, "columns", &given.columns));
    EDGESFT_TRY(api.integer(info, "group", &given.group));
    EDGESFT_TRY(api.integer(info, "sparse", &sparse));
    EDGESFT_TRY(api.integer(info, "value", &value));
    EDGESFT_TRY(api.real(info, "unit", &given.unit));
    given.sparse = static_cast<int32_t>(std::clamp<int64_t>(sparse, -1, 2));
    given.value = static_cast<int32_t>(std::clamp<int64_t>(value, -1, 9));
    Tensor stream, scales;
    EDGESFT_TRY(constant(api, info, 1, ort::UINT8, "stream", stream));
    EDGESFT_TRY(constant(api, info, 2, ort::FLOAT16, "scales", scales));
    given.stream = static_cast<const uint8_t*>(stream.data);
    given.stream_bytes = stream.count;
    given.scales = static_cast<const uint16_t*>(scales.data);
    given.scale_count = scales.count;
    if (const char* why = problem(given)) return refuse(api, std::string("not a packed matrix: ") + why);
    kernel.w = matrix(given);
    kernel.w.memory = share(given, kernel.w);
    if (kernel.w.memory == nullptr) return api.status(ort::FAIL, "edgesft: no memory for a matrix");
    return nullptr;
}

ort::Status* extras(Kernel& kernel, const void* info) {
    const ort::Api& api = kernel.api;
    EDGESFT_TRY(api.integer(info, "level", &kernel.level));
    EDGESFT_TRY(api.integer(info, "gate", &kernel.gate));
    EDGESFT_TRY(api.real(info, "epsilon", &kernel.epsilon));
    if (kernel.level != 0 && kernel.level != 4) return refuse(api, "`level` is not 0 or 4");
    if (kernel.gate && kernel.w.rows % (2 * ROWS)) return refuse(api, "`gate` needs a multiple of 32 rows");
    return nullptr;
}

bool parallel(const void* host, void (*f)(void*, size_t), size_t count, void* what);

struct Host {
    const ort::Api* api;
    const void* context;
    ort::Status* failed;
};

bool parallel(const void* host, void (*f)(void*, size_t), size_t count, void* what) {
    Host& h = *static_cast<Host*>(const_cast<void*>(host));
    h.failed = h.api->parallel(h.context, f, count, what);
    return h.failed == nullptr;
}

// An optional input of `count` numbers.
ort::Status* optional(const ort::Api& api, const void* context, size_t index, size_t given, int64_t count,
                      const char* name, const float*& to) {
    to = nullptr;
    if (index >= given) return nullptr;
    const void* value = nullptr;
    EDGESFT_TRY(api.input(context, index, &value));
    if (value == nullptr) return nullptr;
    static thread_local std::vector<int64_t> sizes;
    Tensor tensor;
    EDGESFT_TRY(look(api, value, tensor, sizes));
    if (tensor.count != count) return refuse(api, std::string("`") + name + "` has another size");
    to = tensor.floats();
    return nullptr;
}

ort::Status* result(const ort::Api& api, void* context, const std::vector<int64_t>& sizes, float*& to) {
    void *value = nullptr, *data = nullptr;
    EDGESFT_TRY(api.output(context, 0, sizes.data(), sizes.size(), &value));
    EDGESFT_TRY(api.data(value, &data));
    to = static_cast<float*>(data);
    return nullptr;
}

ort::Status* multiply(Kernel& kernel, void* context) {
    const ort::Api& api = kernel.api;
    const Matrix& w = kernel.w;
    static thread_local std::vector<int64_t> sizes;
    size_t given = 0;
    const void* value = nullptr;
    Tensor x;
    EDGESFT_TRY(api.inputs(context, &given));
    EDGESFT_TRY(api.input(context, 0, &value));
    EDGESFT_TRY(look(api, value, x, sizes));
    if (sizes.empty() || sizes.back() != w.columns) return refuse(api, "the last axis of `x` is not `columns`");
    Call call{};
    call.x = x.floats();
    call.m = x.count / w.columns;
    call.epsilon = kernel.epsilon;
    call.gate = kernel.gate != 0;
    call.level = static_cast<int32_t>(kernel.level);
    const int64_t width = call.gate ? w.rows / 2 : w.rows;
    EDGESFT_TRY(optional(api, context, 3, given, w.rows, "bias", call.bias));
    EDGESFT_TRY(optional(api, context, 4, given, call.m * width, "residual", call.residual));
    EDGESFT_TRY(optional(api, context, 5, given, w.columns, "norm", call.norm));
    if (call.gate && call.residual) return refuse(api, "`gate` and `residual` exclude each other");
    sizes.back() = width;
    EDGESFT_TRY(result(api, context, sizes, call.y));
    if (call.m == 0) return nullptr;
    Host host{&api, context, nullptr};
    linear(w, call, parallel, &host);
    return host.failed;
}

ort::Status* gather(Kernel& kernel, void* context) {
    const ort::Api& api = kernel.api;
    static thread_local std::vector<int64_t> sizes;
    const void* value = nullptr;
    Tensor ids;
    EDGESFT_TRY(api.input(context, 0, &value));
    EDGESFT_TRY(look(api, value, ids, sizes));
    sizes.push_back(kernel.w.columns);
    const int64_t* rows = static_cast<const int64_t*>(ids.data);
    for (int64_t i = 0; i < ids.count; ++i)
        if (rows[i] < 0 || rows[i] >= kernel.w.rows)
            return refuse(api, "token " + std::to_string(rows[i]) + " is not one of " + std::to_string(kernel.w.rows));
    float* y = nullptr;
    EDGESFT_TRY(result(api, context, sizes, y));
    for (int64_t i = 0; i < ids.count; ++i) read_row(kernel.w, rows[i], y + i * kernel.w.columns);
    return nullptr;
}

template <bool LINEAR>
ort::Status* create(const ort::CustomOp*, const void* table, const void* info, void** made) {
    const ort::Api api(static_cast<const void* const*>(table));
    Kernel* kernel = nullptr;
    ort::Status* failed;
    try {
        kernel = new Kernel(api);
        failed = load(*kernel, info);
        if (LINEAR && !failed) failed = extras(*kernel, info);
    } catch (const std::bad_alloc&) {
        failed = api.status(ort::FAIL, "edgesft: out of memory");
    }
    if (failed) {
        delete kernel;
        return failed;
    }
    *made = kernel;
    return nullptr;
}

template <bool LINEAR>
ort::Status* compute(void* what, void* context) {
    Kernel& kernel = *static_cast<Kernel*>(what);
    try {
        return LINEAR ? multiply(kernel, context) : gather(kernel, context);
    } catch (const std::bad_alloc&) {
        return kernel.api.status(ort::FAIL, "edgesft: out of memory");
    }
}

int zero(const ort::CustomOp*) { return 0; }

template <bool LINEAR>
ort::CustomOp operation() {
    ort::CustomOp op{};
    op.version = ort::VERSION;
    op.name = [](const ort::CustomOp*) { return LINEAR ? "PackedLinear" : "PackedEmbedding"; };
    op.provider = [](const ort::CustomOp*) -> const char* { return nullptr; };
    op.input_type = [](const ort::CustomOp*, size_t index) {
        if (index == 1) return ort::UINT8;
        if (index == 2) return ort::FLOAT16;
        return index == 0 && !LINEAR ? ort::INT64 : ort::FLOAT;
    };
    op.inputs = [](const ort::CustomOp*) -> size_t { return LINEAR ? 6 : 3; };
    op.output_type = [](const ort::CustomOp*, size_t) { return ort::FLOAT; };
    op.outputs = [](const ort::CustomOp*) -> size_t { return 1; };
    op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    op.input_kind = [](const ort::CustomOp*, size_t index) { return index > 2 ? ort::OPTIONAL : ort::REQUIRED; };
    op.output_kind = [](const ort::CustomOp*, size_t) { return ort::REQUIRED; };
    op.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
    op.input_arity = op.input_homogeneity = op.output_arity = op.output_homogeneity = zero;
    op.create_checked = create<LINEAR>;
    op.compute_checked = compute<LINEAR>;
    op.first_version = [](const ort::CustomOp*) { return 1; };
    op.last_version = [](const ort::CustomOp*) { return 0x7FFFFFFF; };
    return op;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(void* options, const ort::Base* base) {
    const void* const* table = base->table(ort::VERSION);
    if (table == nullptr) return nullptr;  // older than 1.17: the session then says that it lacks the operation
    const ort::Api api(table);
    static const ort::CustomOp linear_op = operation<true>(), embedding_op = operation<false>();
    static std::mutex mutex;
    static void* domain = nullptr;  // lives as long as the library, as sessions need it
    const std::lock_guard<std::mutex> lock(mutex);
    if (domain == nullptr) {
        void* made = nullptr;
        EDGESFT_TRY(api.domain("edgesft", &made));
        EDGESFT_TRY(api.add(made, &linear_op));
        EDGESFT_TRY(api.add(made, &embedding_op));
        domain = made;
    }
    return api.use(options, domain);
}
