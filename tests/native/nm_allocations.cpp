// Once every thread has met every layer, products and rows allocate nothing.
//
// operator new is replaced, and the linker hands every other way to memory that the kernels might take to a
// counter first (--wrap). Built and run by tests/unit/kernels/nm_matmul/test_selftest.py.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "linear.h"

using namespace edgesft::nm;

namespace {

std::atomic<long> allocations{0};
std::atomic<bool> counting{false};

void note() {
    if (counting.load(std::memory_order_relaxed)) allocations.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

extern "C" {
void* __real_malloc(size_t);
void* __real_calloc(size_t, size_t);
void* __real_realloc(void*, size_t);
void* __real_aligned_alloc(size_t, size_t);
int __real_posix_memalign(void**, size_t, size_t);
void* __real_mmap(void*, size_t, int, int, int, long);

void* __wrap_malloc(size_t size) { return note(), __real_malloc(size); }
void* __wrap_calloc(size_t count, size_t size) { return note(), __real_calloc(count, size); }
void* __wrap_realloc(void* old, size_t size) { return note(), __real_realloc(old, size); }
void* __wrap_aligned_alloc(size_t to, size_t size) { return note(), __real_aligned_alloc(to, size); }
int __wrap_posix_memalign(void** out, size_t to, size_t size) { return note(), __real_posix_memalign(out, to, size); }
void* __wrap_mmap(void* at, size_t size, int protection, int flags, int file, long offset) {
    return note(), __real_mmap(at, size, protection, flags, file, offset);
}
}

void* operator new(size_t size) {
    note();
    if (void* memory = __real_malloc(size ? size : 1)) return memory;
    throw std::bad_alloc();
}
void* operator new[](size_t size) { return operator new(size); }
void* operator new(size_t size, std::align_val_t to) {
    note();
    const size_t unit = static_cast<size_t>(to);
    if (void* memory = __real_aligned_alloc(unit, (size + unit - 1) / unit * unit)) return memory;
    throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }

namespace {

// A second thread that takes every other part, always the same ones, so that one round meets all there is.
class Pair {
  public:
    Pair() : other_([this] { work(); }) {}
    ~Pair() {
        stop_ = true;
        ++round_;
        other_.join();
    }

    void run(void (*f)(void*, size_t), size_t count, void* what) {
        f_ = f, count_ = count, what_ = what;
        done_ = false;
        ++round_;
        for (size_t i = 0; i < count; i += 2) f(what, i);
        while (!done_) std::this_thread::yield();
    }

  private:
    void work() {
        for (int seen = 0; !stop_;) {
            if (round_ == seen) {
                std::this_thread::yield();
                continue;
            }
            seen = round_;
            for (size_t i = 1; !stop_ && i < count_; i += 2) f_(what_, i);
            done_ = true;
        }
    }

    void (*f_)(void*, size_t) = nullptr;
    size_t count_ = 0;
    void* what_ = nullptr;
    std::atomic<int> round_{0};
    std::atomic<bool> done_{true}, stop_{false};
    std::thread other_;  // last: it runs at once
};

bool by_two(const void* host, void (*f)(void*, size_t), size_t count, void* what) {
    static_cast<Pair*>(const_cast<void*>(host))->run(f, count, what);
    return true;
}

struct Layer {
    std::vector<uint8_t> stream;
    std::vector<uint16_t> scales;
    std::vector<uint8_t> memory;
    Matrix w{};
};

// Every group keeps its first two weights. Few bytes of a stream that says so are not 0.
Layer layer(int64_t rows, int64_t columns, int sparse, int value) {
    Layer made;
    Given given{};
    given.rows = rows, given.columns = columns;
    given.sparse = sparse, given.value = value;
    given.group = value >= FP16 ? 0 : 32;
    given.unit = 1.0f;
    const Matrix w = matrix(given);
    const size_t span = static_cast<size_t>(tile_bytes(sparse, value));
    made.stream.assign(static_cast<size_t>(w.strips * w.tiles) * span, 0);
    for (size_t tile = 0; sparse && tile < made.stream.size(); tile += span)
        for (size_t i = 1; i < 64; i += 2) made.stream[tile + i] = 0x55;  // places 0 and 1
    made.scales.assign(value >= FP16 ? 0 : static_cast<size_t>(w.strips * w.groups * ROWS), 0x3C00);
    given.stream = made.stream.data(), given.stream_bytes = static_cast<int64_t>(made.stream.size());
    given.scales = made.scales.data(), given.scale_count = static_cast<int64_t>(made.scales.size());
    if (const char* why = problem(given)) std::printf("a good matrix was refused: %s\n", why), std::exit(2);
    made.w = matrix(given);
    made.memory.resize(bytes(made.w));
    load(given, made.w, made.memory.data());
    made.w.memory = made.memory.data();
    return made;
}

}  // namespace

int main() {
    Pair pair;
    std::vector<Layer> layers;
    for (int kind = 0; kind < 6; ++kind)
        layers.push_back(layer(512, 384, kind < 2 || kind > 3, kind < 4 ? kind % 2 : kind - 2));
    layers.push_back(layer(1024, 1056, 1, INT4));
    const std::vector<float> x(64 * 1056, 0.5f), norm(1056, 1.0f), bias(1024, 1.0f), residual(64 * 1024, 1.0f);
    std::vector<float> y(64 * 1024);
    int calls = 0, failures = 0;
    for (const char* name : {"generic", "avx2", "avx512", "neon", "neon_dot"}) {
        if (!select(name)) continue;
        for (int round = 0; round < 3; ++round) {
            allocations = 0;
            counting = true;
            for (const Layer& each : layers)
                for (const int64_t m : {1, 4, 5, 40})
                    for (int kind = 0; kind < 8; ++kind) {
                        Call call{};
                        call.x = x.data(), call.y = y.data(), call.m = m;
                        call.level = kind & 1 ? 4 : 0;
                        call.gate = kind >> 1 & 1;
                        call.epsilon = 1e-5f;
                        if (kind & 4) {
                            call.norm = norm.data(), call.bias = bias.data();
                            call.residual = call.gate ? nullptr : residual.data();
                        }
                        linear(each.w, call, by_two, &pair);
                        read_row(each.w, m, y.data());
                        calls += round > 0;
                    }
            counting = false;
            // the very first round is the one that allocates, and shows that it would be seen
            if (calls == 0 ? allocations == 0 : round > 0 && allocations > 0) {
                ++failures;
                std::printf("%s, round %d: %ld allocations\n", name, round, allocations.load());
            }
        }
    }
    std::printf("%d calls without an allocation: %d failures\n", calls, failures);
    return failures != 0;
}
