// Every instruction set of the machine against the generic code, bit for bit, and bad matrices refused.
// Built and run by tests/unit/kernels/nm_matmul/test_selftest.py, under sanitizers and for other processors.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "linear.h"

using namespace edgesft::nm;

namespace {

std::mt19937 rng(1);

int below(int n) { return static_cast<int>(rng() % static_cast<unsigned>(n)); }
float number() { return static_cast<float>(below(2001) - 1000) / 500.0f; }

struct Sample {
    std::vector<uint8_t> stream;
    std::vector<uint16_t> scales;
    Given given{};
};

Sample sample(int64_t rows, int64_t columns, int sparse, int value, int64_t group) {
    Sample s;
    s.given.rows = rows;
    s.given.columns = columns;
    s.given.sparse = sparse;
    s.given.value = value;
    s.given.group = group;
    s.given.unit = 0.5f;
    const Matrix w = matrix(s.given);
    const int64_t span = tile_bytes(sparse, value);
    s.stream.resize(static_cast<size_t>(w.strips * w.tiles * span));
    for (uint8_t& each : s.stream) each = static_cast<uint8_t>(below(256));
    for (size_t tile = 0; tile < s.stream.size(); tile += static_cast<size_t>(span)) {
        if (sparse)
            for (size_t i = 0; i < 64; i += 2) {
                int one = 0, two = 0;
                for (int p = 0; p < 8; p += 2) {
                    const int a = below(3), b = a + 1 + below(3 - a);
                    one |= a << p;
                    two |= b << p;
                }
                s.stream[tile + i] = static_cast<uint8_t>(one);
                s.stream[tile + i + 1] = static_cast<uint8_t>(two);
            }
        if (value >= FP16)  // no NaN and no Inf: those differ in their bits
            for (size_t i = 65; i < 64 + 512; i += 2) s.stream[tile + i] = static_cast<uint8_t>(0x38 + below(8) + 128 * below(2));
    }
    s.scales.resize(value >= FP16 ? 0 : static_cast<size_t>(w.strips * w.groups * ROWS));
    for (uint16_t& each : s.scales) each = static_cast<uint16_t>(0x2000 + below(0x1000) + 0x8000 * below(2));
    s.given.stream = s.stream.data();
    s.given.stream_bytes = static_cast<int64_t>(s.stream.size());
    s.given.scales = s.scales.data();
    s.given.scale_count = static_cast<int64_t>(s.scales.size());
    return s;
}

std::vector<float> floats(int64_t count) {
    std::vector<float> v(static_cast<size_t>(count));
    for (float& each : v) each = number();
    return v;
}

int failures = 0, compared = 0;

void compare(const Sample& s, int64_t m, int level, int gate, bool more, const std::vector<const char*>& sets) {
    Matrix w = matrix(s.given);
    std::vector<uint8_t> memory(bytes(w));
    load(s.given, w, memory.data());
    w.memory = memory.data();
    const std::vector<float> x = floats(m * w.columns), norm = floats(w.columns), bias = floats(w.rows);
    const std::vector<float> residual = floats(m * w.rows);
    const size_t size = static_cast<size_t>(m * (gate ? w.rows / 2 : w.rows));
    std::vector<float> first;
    for (const char* name : sets) {
        select(name);
        std::vector<float> y(size, -7.0f);
        Call call{};
        call.x = x.data();
        call.y = y.data();
        call.m = m;
        call.level = level;
        call.gate = gate;
        call.epsilon = 1e-5f;
        if (more) {
            call.norm = norm.data();
            call.bias = bias.data();
            call.residual = gate ? nullptr : residual.data();
        }
        if (!linear(w, call, nullptr, nullptr)) ++failures;
        if (first.empty()) first = y;
        ++compared;
        if (std::memcmp(first.data(), y.data(), size * sizeof(float)) == 0) continue;
        if (++failures < 10)
            std::printf("%s differs: %ld x %ld, sparse %d, value %d, m %ld, level %d, gate %d\n", name, (long)w.rows,
                        (long)w.columns, w.sparse, w.value, (long)m, level, gate);
    }
}

void expect(const Given& given, const char* words) {
    const char* why = problem(given);
    if (why != nullptr && std::string(why).find(words) != std::string::npos) return;
    ++failures;
    std::printf("expected `%s`, got `%s`\n", words, why ? why : "no problem");
}

void refusals() {
    Sample s = sample(33, 70, 1, INT4, 32);
    if (problem(s.given)) ++failures;
    Given g = s.given;
    --g.stream_bytes;
    expect(g, "stream has another size");
    g = s.given;
    g.rows = int64_t{1} << 40;
    expect(g, "rows and columns");
    g = s.given;
    g.group = 33;
    expect(g, "multiple of 32");
    g = s.given;
    g.value = 9;
    expect(g, "unknown kind");
    s.scales[5] = 0x7C00;
    expect(s.given, "scale is not finite");
    s.scales[5] = 0;
    s.stream[s.stream.size() - 192] = s.stream[s.stream.size() - 191];
    expect(s.given, "not in order");
}

void buffers() {
    std::vector<void*> all;
    for (int i = 0; i < 200; ++i) {
        const size_t bytes = static_cast<size_t>(1 + below(1 << 20));
        uint8_t* memory = static_cast<uint8_t*>(buffer(bytes));
        if (memory == nullptr || reinterpret_cast<uintptr_t>(memory) % 64) ++failures;
        memory[0] = memory[bytes - 1] = 1;
        all.push_back(memory);
        if (below(3) == 0) {
            const size_t at = static_cast<size_t>(below(static_cast<int>(all.size())));
            release(all[at]);
            all.erase(all.begin() + static_cast<std::ptrdiff_t>(at));
        }
    }
    for (void* each : all) release(each);
    release(nullptr);
}

}  // namespace

int main() {
    std::vector<const char*> sets;
    for (const char* name : {"generic", "avx2", "avx512", "neon", "neon_dot"})
        if (select(name)) sets.push_back(name);
    const int64_t shapes[][2] = {{1, 1}, {16, 32}, {32, 33}, {50, 100}, {64, 160}};
    for (const auto& shape : shapes)
        for (int kind = 0; kind < 6; ++kind) {
            const int sparse = kind < 2 || kind > 3, value = kind < 4 ? kind % 2 : kind - 2;
            for (const int64_t group : {0, 32, 64}) {
                if (value >= FP16 && group) continue;
                const Sample s = sample(shape[0], shape[1], sparse, value, group);
                if (const char* why = problem(s.given)) {
                    ++failures;
                    std::printf("a good matrix was refused: %s\n", why);
                    continue;
                }
                for (const int64_t m : {1, 2, 3, 4, 5, 7, 24, 33})
                    for (const int level : {0, 4}) {
                        compare(s, m, level, 0, false, sets);
                        compare(s, m, level, 0, true, sets);
                        if (shape[0] % 32 == 0) compare(s, m, level, 1, true, sets);
                    }
            }
        }
    // wide enough for several panels, and groups that are wider than one
    for (const int64_t group : {0, 32, 96, 1056, 2048})
        for (int kind = 0; kind < 6; ++kind) {
            const int sparse = kind < 2 || kind > 3, value = kind < 4 ? kind % 2 : kind - 2;
            if (value >= FP16 && group) continue;
            const Sample s = sample(80, 2250, sparse, value, group);
            compare(s, 1, 4, 0, true, sets);
            if (group == 32 || group == 1056)
                for (const int64_t m : {18, 25}) compare(s, m, 4, 0, false, sets);
            if (group == 0) compare(s, 17, 0, 0, false, sets);
        }
    refusals();
    buffers();
    std::printf("%d compared on", compared);
    for (const char* name : sets) std::printf(" %s", name);
    std::printf(": %d failures\n", failures);
    return failures != 0;
}
