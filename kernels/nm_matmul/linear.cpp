#include "linear.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__) || defined(__APPLE__)
#include <sys/mman.h>
#endif
#if defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

namespace edgesft::nm {

namespace {

constexpr size_t HUGE_PAGE = size_t{1} << 21, SLAB = size_t{32} << 20;
constexpr int64_t PARTS = 64;             // of a matrix at most, handed out to threads
// ... and how long one should be: each begins a stream anew (measured: 16 KiB cost a tenth of small matrices), but
// rather short than a processor without any.
constexpr int64_t PART_BYTES = 96 << 10, LEAST_PART_BYTES = 16 << 10;
constexpr int64_t MANY = 24;              // rows of x from which spreading a strip pays (measured: 16 to 32)

// ---------------------------------------------------------------- instruction sets

std::vector<const Table*> present() {
    std::vector<const Table*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    // every processor with AVX2 has F16C; compilers of old cannot ask for it
    if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni"))
        found.push_back(&avx512);
    if (fma) found.push_back(&avx2);
#elif defined(__aarch64__)
#if defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back(&neon_dot);
#elif defined(__APPLE__)
    found.push_back(&neon_dot);  // all of Apple's have it
#endif
    found.push_back(&neon);
#endif
    found.push_back(&generic);
    return found;
}

const Table* by_name(const char* name) {
    for (const Table* each : present())
        if (std::strcmp(each->name, name) == 0) return each;
    return nullptr;
}

const Table* first() {
    const char* asked = std::getenv("EDGESFT_ISA");
    const Table* found = asked ? by_name(asked) : nullptr;
    return found ? found : present().front();
}

std::atomic<const Table*>& chosen() {
    static std::atomic<const Table*> it{first()};
    return it;
}

// ---------------------------------------------------------------- numbers

float half(uint16_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const float size = exponent == 0    ? std::ldexp(static_cast<float>(fraction), -24)
                       : exponent == 31 ? (fraction ? NAN : INFINITY)
                                        : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return h & 0x8000 ? -size : size;
}

float brain(uint16_t b) {
    const uint32_t bits = static_cast<uint32_t>(b) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Weight of slot (plane p, byte s) in row i of a tile's planes, without scale.
float slot(const uint8_t* planes, int value, int i, int p, int s) {
    if (value >= FP16) {
        uint16_t bits;
        std::memcpy(&bits, planes + 32 * (4 * p + s) + 2 * i, 2);
        return value == FP16 ? half(bits) : brain(bits);
    }
    if (value == INT8) return static_cast<float>(planes[64 * p + 4 * i + s] - 128);
    const int both = planes[64 * (p / 2) + 4 * i + s];
    return static_cast<float>((p % 2 ? both >> 4 : both & 15) - 8);
}

// Mapped from a file, `bytes` from `start` on are read in one go instead of page by page.
void read_ahead(const void* start, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t PAGE = 4096;
    const uintptr_t from = reinterpret_cast<uintptr_t>(start) / PAGE * PAGE;
    madvise(reinterpret_cast<void*>(from), reinterpret_cast<uintptr_t>(start) + static_cast<size_t>(bytes) - from,
            MADV_WILLNEED);
#else
    (void)start, (void)bytes;
#endif
}

// ---------------------------------------------------------------- matrices

// Whether both places of every group of an index block are in order, all fields of a word at once.
bool ordered(const uint8_t* index) {
    constexpr uint32_t LOWER = 0x00550055;  // bits of the fields of bytes 0 and 2
    uint32_t words[ROWS], found = LOWER;
    std::memcpy(words, index, sizeof words);
    for (const uint32_t word : words) {
        const uint32_t one = word, two = word >> 8, one_high = one >> 1, two_high = two >> 1;
        found &= (~one_high & two_high) | (~(one_high ^ two_high) & ~one & two);
    }
    return found == LOWER;
}

// Panels of one width, of whole groups or parts of one.
int64_t panel_tiles(const Matrix& w) {
    if (w.tiles <= WIDE) return w.tiles;
    if (w.group_tiles >= w.tiles || w.value >= FP16) {
        const int64_t panels = (w.tiles + WIDE - 1) / WIDE;
        return (w.tiles + panels - 1) / panels;
    }
    if (w.group_tiles > WIDE) return w.group_tiles % WIDE ? w.group_tiles : WIDE;
    const int64_t most = WIDE / w.group_tiles, panels = (w.groups + most - 1) / most;
    return (w.groups + panels - 1) / panels * w.group_tiles;
}

// ---------------------------------------------------------------- memory

// Grows only; each thread has its own.
class Arena {
  public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() { std::free(memory_); }

    uint8_t* have(size_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = 0;
            memory_ = static_cast<uint8_t*>(std::aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE));
            if (memory_ == nullptr) throw std::bad_alloc();
            size_ = bytes;
        }
        return memory_;
    }

  private:
    uint8_t* memory_ = nullptr;
    size_t size_ = 0;
};

struct Slab {
    uint8_t* memory;
    size_t size, used, users;
};

struct Slabs {
    std::mutex mutex;
    std::vector<Slab> all;
};

Slabs& slabs() {
    static Slabs* it = new Slabs;  // never destroyed: sessions may end after statics do
    return *it;
}

uint8_t* map(size_t size) {
#if defined(__linux__)
    // one huge page more, to begin where one begins
    void* got = mmap(nullptr, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED) return nullptr;
    uint8_t* start = static_cast<uint8_t*>(got);
    const size_t before = (HUGE_PAGE - reinterpret_cast<uintptr_t>(start) % HUGE_PAGE) % HUGE_PAGE;
    if (before) munmap(start, before);
    if (HUGE_PAGE - before) munmap(start + before + size, HUGE_PAGE - before);
    madvise(start + before, size, MADV_HUGEPAGE);  // where it is refused, pages are small
    return start + before;
#else
    return static_cast<uint8_t*>(std::aligned_alloc(LINE, size));
#endif
}

void unmap(uint8_t* memory, size_t size) {
#if defined(__linux__)
    munmap(memory, size);
#else
    (void)size;
    std::free(memory);
#endif
}

// ---------------------------------------------------------------- work

struct Job {
    const Table* isa;
    const Matrix* w;
    const Call* call;
    Activations x;
    Finish finish;
    int64_t parts;
    // where the rows of x go
    int8_t* codes;
    float* scales;
    int32_t* sums;
    float* floats;
};

void prepare(void* what, size_t row) {
    const Job& job = *static_cast<const Job*>(what);
    const Matrix& w = *job.w;
    const int64_t at = static_cast<int64_t>(row) * w.tiles;
    const float* x = job.call->x + static_cast<int64_t>(row) * w.columns;
    if (job.call->norm) {
        static thread_local Arena arena;
        float* normed = reinterpret_cast<float*>(arena.have(static_cast<size_t>(w.columns) * sizeof(float)));
        job.isa->normalize(x, job.call->norm, job.call->epsilon, w.columns, normed);
        x = normed;
    }
    if (job.codes) {
        job.isa->quantize(x, w.columns, w.tiles, job.codes + at * COLUMNS, job.scales + at, job.sums + at);
        return;
    }
    float* to = job.floats + at * COLUMNS;
    std::memcpy(to, x, static_cast<size_t>(w.columns) * sizeof(float));
    std::fill(to + w.columns, to + w.tiles * COLUMNS, 0.0f);
}

void part(void* what, size_t number) {
    const Job& job = *static_cast<const Job*>(what);
    const Matrix& w = *job.w;
    const int64_t blocks = (w.strips + w.block - 1) / w.block, n = static_cast<int64_t>(number);
    const int64_t from = blocks * n / job.parts * w.block;
    const int64_t to = std::min(blocks * (n + 1) / job.parts * w.block, w.strips);
    if (job.codes == nullptr || w.value >= FP16 || job.call->m < MANY)
        return job.isa->packed(w, job.x, job.call->m, from, to, job.finish);
    static thread_local Arena arena;
    job.isa->spread(w, job.x, job.call->m, from, to, job.finish, arena.have(static_cast<size_t>(spread_bytes(w))));
}

bool run(Parallel parallel, const void* host, void (*f)(void*, size_t), size_t count, void* what) {
    if (parallel && count > 1) return parallel(host, f, count, what);
    for (size_t i = 0; i < count; ++i) f(what, i);
    return true;
}

}  // namespace

const Table& table() { return *chosen().load(std::memory_order_relaxed); }

bool select(const char* name) {
    const Table* found = by_name(name);
    if (found) chosen().store(found);
    return found != nullptr;
}

const char* problem(const Given& g) {
    constexpr int64_t MOST = int64_t{1} << 31;
    if (g.rows < 1 || g.columns < 1 || g.rows >= MOST || g.columns >= MOST) return "rows and columns are not 1 to 2^31";
    if (g.value < INT4 || g.value > BF16) return "an unknown kind of values";
    if (g.sparse != 0 && g.sparse != 1) return "an unknown pattern";
    if (!g.sparse && g.value >= FP16) return "fp16 and bf16 are for 2:4 only";
    if (g.group < 0 || g.group % COLUMNS) return "the group is not a multiple of 32";
    if (g.value >= FP16 && g.group) return "fp16 and bf16 have no groups";
    if (!std::isfinite(g.unit)) return "the unit is not finite";
    if (g.stream == nullptr || (g.scale_count && g.scales == nullptr)) return "data is missing";
    const Matrix w = matrix(g);
    if (g.stream_bytes != w.strips * w.tiles * tile_bytes(g.sparse, g.value)) return "the stream has another size";
    if (g.scale_count != (g.value >= FP16 ? 0 : w.strips * w.groups * ROWS)) return "the scales have another number";
    for (int64_t i = 0; i < g.scale_count; ++i)
        if ((g.scales[i] & 0x7C00) == 0x7C00) return "a scale is not finite";
    read_ahead(g.stream, g.stream_bytes);
    if (!g.sparse) return nullptr;
    const int64_t bytes = tile_bytes(g.sparse, g.value);
    for (int64_t t = 0; t < w.strips * w.tiles; ++t)
        if (!ordered(g.stream + t * bytes)) return "two places of a group are not in order";
    return nullptr;
}

Matrix matrix(const Given& g) {
    Matrix w{};
    w.rows = g.rows;
    w.columns = g.columns;
    w.tiles = (g.columns + COLUMNS - 1) / COLUMNS;
    w.strips = (g.rows + ROWS - 1) / ROWS;
    w.group_tiles = g.group ? g.group / COLUMNS : w.tiles;
    w.groups = (w.tiles + w.group_tiles - 1) / w.group_tiles;
    w.sparse = g.sparse;
    w.value = g.value;
    w.unit = g.unit;
    w.panel_tiles = panel_tiles(w);
    w.panels = (w.tiles + w.panel_tiles - 1) / w.panel_tiles;
    // blocks are what threads are given, so narrow matrices are cut into small ones
    w.block = w.strips >= 8 * BLOCK ? BLOCK : w.strips >= 2 * BLOCK ? BLOCK / 2 : 2;
    w.piece = w.extent(0, tile_bytes(w.sparse, w.value));
    w.last = w.extent(w.panels - 1, tile_bytes(w.sparse, w.value));
    w.whole = (w.panels - 1) * w.piece + w.last;
    return w;
}

void load(const Given& given, const Matrix& w, uint8_t* memory) {
    Matrix made = w;
    made.memory = memory;
    const int64_t bytes = tile_bytes(w.sparse, w.value);
    for (int64_t s = 0; s < w.strips; ++s)
        for (int64_t p = 0; p < w.panels; ++p) {
            uint8_t* to = memory + (made.at(s, p) - made.memory);
            for (int64_t g = 0; g < w.groups_of(p); ++g) {
                const int64_t tile = p * w.panel_tiles + g * w.group_tiles;
                const int64_t count = std::min(w.group_tiles, w.tiles_of(p) - g * w.group_tiles);
                uint8_t* tiles = to + w.before(g, bytes);
                std::memcpy(tiles, given.stream + (s * w.tiles + tile) * bytes, static_cast<size_t>(count * bytes));
                if (given.value >= FP16) continue;
                uint8_t* pair = to + w.before(g & ~int64_t{1}, bytes) - LINE;
                if (g % 2 == 0) std::memset(pair, 0, LINE);
                std::memcpy(pair + g % 2 * 2 * ROWS, given.scales + (s * w.groups + tile / w.group_tiles) * ROWS, 2 * ROWS);
            }
        }
}

bool linear(const Matrix& w, const Call& call, Parallel parallel, const void* host) {
    static thread_local Arena arena;
    Job job{};
    job.isa = &table();
    job.w = &w;
    job.call = &call;
    job.finish = {call.y, call.bias, call.residual, call.gate ? w.rows / 2 : w.rows, call.gate};
    const size_t blocks = static_cast<size_t>(call.m * w.tiles);
    if (call.level == 4 && w.value < FP16) {
        uint8_t* memory = arena.have(blocks * (COLUMNS + sizeof(float) + sizeof(int32_t)));
        job.codes = reinterpret_cast<int8_t*>(memory);
        job.scales = reinterpret_cast<float*>(memory + blocks * COLUMNS);
        job.sums = reinterpret_cast<int32_t*>(job.scales + blocks);
    } else {
        job.floats = reinterpret_cast<float*>(arena.have(blocks * COLUMNS * sizeof(float)));
    }
    job.x = {w.tiles, job.codes, job.scales, job.sums, job.floats};
    // few rows are prepared faster than threads are woken
    if (!run(call.m > FEW ? parallel : nullptr, host, prepare, static_cast<size_t>(call.m), &job)) return false;

    const int64_t bytes = w.strips * w.whole * std::max<int64_t>(1, call.m / FEW);
    static const int64_t processors = std::max<int64_t>(1, std::thread::hardware_concurrency());
    const int64_t wanted = std::max(bytes / PART_BYTES, std::min(processors, bytes / LEAST_PART_BYTES));
    job.parts = std::clamp(wanted, int64_t{1}, std::min(PARTS, (w.strips + w.block - 1) / w.block));
    return run(parallel, host, part, static_cast<size_t>(job.parts), &job);
}

void read_row(const Matrix& w, int64_t row, float* y) {
    const int64_t strip = row / ROWS, bytes = tile_bytes(w.sparse, w.value);
    const int i = static_cast<int>(row % ROWS);
    for (int64_t t = 0; t < w.tiles; ++t) {
        const int64_t panel = t / w.panel_tiles, inside = t % w.panel_tiles, group = inside / w.group_tiles;
        const uint8_t* piece = w.at(strip, panel);
        const uint8_t* tile = piece + w.before(group, bytes) + inside % w.group_tiles * bytes;
        float values[COLUMNS] = {};
        for (int p = 0; p < (w.sparse ? 4 : 8); ++p)
            for (int s = 0; s < 4; ++s) {
                const int column = w.sparse ? 8 * p + 4 * (s / 2) + (tile[4 * i + s] >> 2 * p & 3) : 4 * p + s;
                values[column] = slot(tile + (w.sparse ? 64 : 0), w.value, i, p, s);
            }
        uint16_t bits = 0x3C00;  // 1
        if (w.value < FP16)
            std::memcpy(&bits, piece + w.before(group & ~int64_t{1}, bytes) - LINE + 2 * (group % 2 * ROWS + i), 2);
        const float scale = half(bits);
        const int count = static_cast<int>(std::min<int64_t>(COLUMNS, w.columns - t * COLUMNS));
        for (int k = 0; k < count; ++k) y[t * COLUMNS + k] = values[k] * scale * w.unit;
    }
}

void* buffer(size_t bytes) {
    // end to end in the order of use, so that one matrix goes on where another ends
    const size_t size = (bytes + LINE - 1) / LINE * LINE;
    Slabs& s = slabs();
    const std::lock_guard<std::mutex> lock(s.mutex);
    for (Slab& slab : s.all)
        if (slab.size - slab.used >= size) {
            void* found = slab.memory + slab.used;
            slab.used += size;
            ++slab.users;
            return found;
        }
    const size_t whole = std::max(SLAB, (size + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    uint8_t* memory = map(whole);
    if (memory == nullptr) return nullptr;
    s.all.push_back({memory, whole, size, 1});
    return memory;
}

void release(void* memory) {
    if (memory == nullptr) return;
    Slabs& s = slabs();
    const std::lock_guard<std::mutex> lock(s.mutex);
    for (size_t i = 0; i < s.all.size(); ++i) {
        Slab& slab = s.all[i];
        const uint8_t* at = static_cast<uint8_t*>(memory);
        if (at < slab.memory || at >= slab.memory + slab.size) continue;
        if (--slab.users == 0) {
            unmap(slab.memory, slab.size);
            s.all.erase(s.all.begin() + static_cast<std::ptrdiff_t>(i));
        }
        return;
    }
}

}  // namespace edgesft::nm

// ---------------------------------------------------------------- for ctypes and C

#define EDGESFT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace edgesft::nm;

// The pool of an OpenMP runtime that the process has anyway (GOMP_parallel of torch's): no second one.
using Team = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
struct Host {
    Team team;
    unsigned threads;
};
struct Share {
    void (*f)(void*, size_t);
    void* what;
    size_t count;
    std::atomic<size_t> next;
};

bool with_team(const void* what, void (*f)(void*, size_t), size_t count, void* job) {
    const Host& host = *static_cast<const Host*>(what);
    Share share{f, job, count, {0}};
    host.team(
        [](void* of) {
            Share& s = *static_cast<Share*>(of);
            for (size_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) s.f(s.what, i);
        },
        &share, host.threads, 0);
    return true;
}

}  // namespace

EDGESFT_EXPORT int edgesft_nm_abi() { return ABI; }
EDGESFT_EXPORT const char* edgesft_nm_isa() { return table().name; }
EDGESFT_EXPORT int edgesft_nm_select(const char* name) { return select(name); }
EDGESFT_EXPORT const char* edgesft_nm_problem(const Given* given) { return problem(*given); }
EDGESFT_EXPORT size_t edgesft_nm_bytes(const Given* given) { return bytes(matrix(*given)); }
EDGESFT_EXPORT void edgesft_nm_load(const Given* given, void* memory) {
    load(*given, matrix(*given), static_cast<uint8_t*>(memory));
}
EDGESFT_EXPORT void* edgesft_nm_buffer(size_t bytes) { return buffer(bytes); }
EDGESFT_EXPORT void edgesft_nm_release(void* memory) { release(memory); }

// 0, or 1 when memory ran out. `memory`: what `load` made of a matrix found without a problem. `team`: GOMP_parallel
// or null, which is one thread.
EDGESFT_EXPORT int edgesft_nm_linear(const Given* given, const void* memory, const Call* call, void* team,
                                     unsigned threads) {
    try {
        Matrix w = matrix(*given);
        w.memory = static_cast<const uint8_t*>(memory);
        Host host{};
        std::memcpy(&host.team, &team, sizeof team);
        host.threads = threads;
        return !linear(w, *call, team && threads > 1 ? with_team : nullptr, &host);
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// Reads memory in one stream, as the kernels do, and nothing else: the roof that they are measured against.
EDGESFT_EXPORT uint64_t edgesft_nm_read(const uint8_t* memory, size_t bytes) { return table().read(memory, bytes); }

EDGESFT_EXPORT void edgesft_nm_rows(const Given* given, const void* memory, const int64_t* rows, int64_t count,
                                    float* y) {
    Matrix w = matrix(*given);
    w.memory = static_cast<const uint8_t*>(memory);
    for (int64_t i = 0; i < count; ++i) read_row(w, rows[i], y + i * w.columns);
}
