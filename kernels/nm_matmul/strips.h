// The loops over strips, written once over the vectors of an instruction set `I`:
//   Bytes: 64 bytes; Ints, Floats: 16 lanes, one a row
//   load, words (64 bytes as Ints), halves and brains (16 fp16 or bf16 as Floats), zero, spread (one float 16 times)
//   low, high (the nibbles of 64 bytes), raise (+ 120), floats (of Ints), multiply_add, store
//   piece<SHIFT, BITS>(Ints): those bits of every lane; less<OFFSET>: minus a constant
//   fields<P>(index block): the fields p, 0..3; place<P>(fields): as offsets among the 16 columns from 16 (p / 2) on
//   pick(x, places): bytes of the 16 at x; among(four floats, Ints): those of the lower two bits of a lane
//   merge<HALF>(codes, fields): a plane of 2:4 to one of dense int8, see `Spread`
//   Sparse<OFFSET>, Dense<OFFSET>: sums of (code - OFFSET) * x in int32, exact; begin(sum of x), add, sum
//   MANY: rows of x that its registers hold in a dense product
// Every instruction set gives the same bits: sums of integers are exact, and floats meet in one order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "nm.h"

namespace edgesft::nm {

// Plain arithmetic on 16 floats, which the compiler spreads over what the machine has.
typedef float Lanes __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(64)));
typedef uint32_t Modular __attribute__((vector_size(64)));

// e^x (Cephes' polynomial, 2 ulp): no library's, so that no two machines differ.
inline Lanes exponential(Lanes x) {
    x = x < -87.0f ? Lanes{} - 87.0f : x;
    x = x > 88.0f ? Lanes{} + 88.0f : x;
    const Lanes shifted = x * 1.44269504f + 12582912.0f;  // rounds to a whole number in the lower bits
    const Lanes n = shifted - 12582912.0f;
    const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (Lanes)((Words)p + ((Words)shifted << 23));
}

template <class I>
struct Strips {
    using Bytes = typename I::Bytes;
    using Ints = typename I::Ints;
    using Floats = typename I::Floats;

    // ------------------------------------------------------------ what a tile is

    // The code (less its offset) or number of slot s of plane P, for 16 rows.
    template <int VALUE, int P, int S>
    static Floats number(const uint8_t* planes) {
        if constexpr (VALUE == INT4)
            return I::floats(I::template less<8>(
                I::template piece<8 * S + 4 * (P % 2), 4>(I::words(planes + 64 * (P / 2)))));
        else if constexpr (VALUE == INT8)
            return I::floats(I::template less<128>(I::template piece<8 * S, 8>(I::words(planes + 64 * P))));
        else if constexpr (VALUE == FP16)
            return I::halves(planes + 32 * (4 * P + S));
        else
            return I::brains(planes + 32 * (4 * P + S));
    }

    template <int VALUE, int P>
    static Bytes codes(const uint8_t* planes) {
        if constexpr (VALUE == INT8) return I::load(planes + 64 * P);
        const Bytes both = I::load(planes + 64 * (P / 2));
        return P % 2 ? I::high(both) : I::low(both);
    }

    // Products of a tile of codes with M rows of x, in int32.
    template <int SPARSE, int VALUE, int M>
    struct Whole {
        static constexpr int OFFSET = VALUE == INT4 ? 8 : 128;
        using Sum = std::conditional_t<SPARSE, typename I::template Sparse<OFFSET>, typename I::template Dense<OFFSET>>;

        template <int P>
        static void plane(const uint8_t* tile, const int8_t* const* x, Sum* sums) {
            if constexpr (SPARSE) {
                const Bytes code = codes<VALUE, P>(tile + 64);
                const Bytes places = I::template place<P>(I::template fields<P>(I::load(tile)));
                for (int m = 0; m < M; ++m) sums[m].add(code, I::pick(x[m] + 16 * (P / 2), places));
            } else {
                const Bytes code = codes<VALUE, P>(tile);
                for (int m = 0; m < M; ++m) sums[m].add(code, x[m] + 4 * P);
            }
        }
        template <int... P>
        static void planes(const uint8_t* tile, const int8_t* const* x, Sum* sums, std::integer_sequence<int, P...>) {
            (plane<P>(tile, x, sums), ...);
        }
        static void add(const uint8_t* tile, const Activations& a, int64_t m0, int64_t t, Floats* part) {
            const int8_t* x[M];
            Sum sums[M];
            for (int m = 0; m < M; ++m) {
                const int64_t block = (m0 + m) * a.tiles + t;
                x[m] = a.codes + block * COLUMNS;
                sums[m].begin(a.sums + block);
            }
            planes(tile, x, sums, std::make_integer_sequence<int, SPARSE ? 4 : 8>());
            for (int m = 0; m < M; ++m)
                part[m] = I::multiply_add(I::floats(sums[m].sum()), I::spread(a.scales[(m0 + m) * a.tiles + t]), part[m]);
        }
    };

    // The same with rows of x in floats.
    template <int SPARSE, int VALUE, int M>
    struct Real {
        template <int P, int S>
        static void slot(const uint8_t* tile, const float* const* x, Floats* part) {
            const Floats w = number<VALUE, P, S>(tile + (SPARSE ? 64 : 0));
            if constexpr (SPARSE) {
                const Ints place = I::template piece<8 * S + 2 * P, 2>(I::words(tile));
                for (int m = 0; m < M; ++m)
                    part[m] = I::multiply_add(w, I::among(x[m] + 4 * (2 * P + S / 2), place), part[m]);
            } else {
                for (int m = 0; m < M; ++m) part[m] = I::multiply_add(w, I::spread(x[m][4 * P + S]), part[m]);
            }
        }
        template <int P>
        static void plane(const uint8_t* tile, const float* const* x, Floats* part) {
            slot<P, 0>(tile, x, part);
            slot<P, 1>(tile, x, part);
            slot<P, 2>(tile, x, part);
            slot<P, 3>(tile, x, part);
        }
        template <int... P>
        static void planes(const uint8_t* tile, const float* const* x, Floats* part, std::integer_sequence<int, P...>) {
            (plane<P>(tile, x, part), ...);
        }
        static void add(const uint8_t* tile, const Activations& a, int64_t m0, int64_t t, Floats* part) {
            const float* x[M];
            for (int m = 0; m < M; ++m) x[m] = a.floats + ((m0 + m) * a.tiles + t) * COLUMNS;
            planes(tile, x, part, std::make_integer_sequence<int, SPARSE ? 4 : 8>());
        }
    };

    // ------------------------------------------------------------ strips

    // `count` floats, zeros behind them.
    static Lanes few(const float* from, int64_t count) {
        Lanes v{};
        if (count >= ROWS)
            std::memcpy(&v, from, sizeof v);
        else
            std::memcpy(&v, from, static_cast<size_t>(count) * sizeof(float));
        return v;
    }

    // Results of rows 16 strip .. of the matrix for one row m of x.
    static void finish(const Matrix& w, const Finish& f, int64_t m, int64_t strip, Floats sums) {
        alignas(64) float stored[ROWS];
        I::store(stored, sums);
        const int64_t count = std::min<int64_t>(ROWS, w.rows - strip * ROWS);
        Lanes y;
        std::memcpy(&y, stored, sizeof y);
        y *= w.unit;
        if (f.bias) y += few(f.bias + strip * ROWS, count);
        if (f.gate) {  // the gate waits in y for its partner
            float* to = f.y + m * f.width + strip / 2 * ROWS;
            y = strip % 2 ? y * few(to, ROWS) : y / (exponential(-y) + 1.0f);
            std::memcpy(to, &y, sizeof y);
            return;
        }
        const int64_t at = m * f.width + strip * ROWS;
        if (f.residual) y += few(f.residual + at, count);
        if (count == ROWS)
            std::memcpy(f.y + at, &y, sizeof y);
        else
            std::memcpy(f.y + at, &y, static_cast<size_t>(count) * sizeof(float));
    }

    // Adds the products of a piece of `tiles` tiles, the first of them tile t0 of a row, with M rows of x from m0 on to
    // `sums`. GROUP: tiles that share scales, where it is known beforehand; else 0, and `group_tiles` says it.
    template <template <int, int, int> class Kind, int SPARSE, int VALUE, int M, int GROUP>
    static void groups(const uint8_t* piece, int64_t tiles, int64_t group_tiles, const Activations& x, int64_t m0,
                       int64_t t0, Floats* sums) {
        constexpr int64_t SPAN = VALUE >= FP16 ? 576 : (SPARSE ? 64 : 0) + (SPARSE ? 4 : 8) * (VALUE == INT4 ? 32 : 64);
        int64_t t = 0;
        Floats total[M];  // in registers: `piece` may be anywhere
        for (int m = 0; m < M; ++m) total[m] = sums[m];
        if constexpr (VALUE >= FP16) {  // no scales
            for (; t < tiles; ++t, piece += SPAN) Kind<SPARSE, VALUE, M>::add(piece, x, m0, t0 + t, total);
            for (int m = 0; m < M; ++m) sums[m] = total[m];
            return;
        }
        const int64_t step = GROUP ? GROUP : group_tiles;
        const auto group = [&](const uint8_t* scales, int64_t count) {
            Floats part[M];
            for (int m = 0; m < M; ++m) part[m] = I::zero();
            for (int64_t i = 0; i < count; ++i, ++t, piece += SPAN)
                Kind<SPARSE, VALUE, M>::add(piece, x, m0, t0 + t, part);
            const Floats s = I::halves(scales);
            for (int m = 0; m < M; ++m) total[m] = I::multiply_add(s, part[m], total[m]);
        };
        while (t + 2 * step <= tiles) {
            const uint8_t* scales = piece;
            piece += LINE;
            group(scales, step);
            group(scales + 2 * ROWS, step);
        }
        if (t < tiles) {
            const uint8_t* scales = piece;
            piece += LINE;
            group(scales, std::min(step, tiles - t));
            if (t < tiles) group(scales + 2 * ROWS, tiles - t);
        }
        for (int m = 0; m < M; ++m) sums[m] = total[m];
    }

    // The same, GROUP chosen.
    template <template <int, int, int> class Kind, int SPARSE, int VALUE, int M>
    static void some(const uint8_t* piece, int64_t tiles, int64_t group_tiles, const Activations& x, int64_t m0,
                     int64_t t0, Floats* total) {
        if constexpr (M == 1 && VALUE == INT4) {
            if (group_tiles == 1) return groups<Kind, SPARSE, VALUE, M, 1>(piece, tiles, 1, x, m0, t0, total);
            if (group_tiles == 2) return groups<Kind, SPARSE, VALUE, M, 2>(piece, tiles, 2, x, m0, t0, total);
        }
        groups<Kind, SPARSE, VALUE, M, 0>(piece, tiles, group_tiles, x, m0, t0, total);
    }

    // The same for `count` rows of x, at most MOST at a time.
    template <template <int, int, int> class Kind, int SPARSE, int VALUE, int MOST>
    static void rows(const uint8_t* piece, int64_t tiles, int64_t group_tiles, const Activations& x, int64_t m0,
                     int64_t count, int64_t t0, Floats* total) {
        int64_t m = 0;
        if constexpr (MOST >= 8)
            for (; m + 8 <= count; m += 8)
                some<Kind, SPARSE, VALUE, 8>(piece, tiles, group_tiles, x, m0 + m, t0, total + m);
        if constexpr (MOST >= 4)
            for (; m + 4 <= count; m += 4)
                some<Kind, SPARSE, VALUE, 4>(piece, tiles, group_tiles, x, m0 + m, t0, total + m);
        if constexpr (MOST >= 2)
            for (; m + 2 <= count; m += 2)
                some<Kind, SPARSE, VALUE, 2>(piece, tiles, group_tiles, x, m0 + m, t0, total + m);
        for (; m < count; ++m) some<Kind, SPARSE, VALUE, 1>(piece, tiles, group_tiles, x, m0 + m, t0, total + m);
    }

    static constexpr int TOGETHER = 16;  // rows of x that a block of strips is gone through with

    template <template <int, int, int> class Kind, int SPARSE, int VALUE>
    static void all(const Matrix& w, const Activations& x, int64_t m, int64_t first, int64_t last, const Finish& f) {
        Floats total[BLOCK * TOGETHER];
        for (int64_t from = first; from < last;) {
            const int64_t to = std::min(from / w.block * w.block + w.block, last);
            for (int64_t m0 = 0; m0 < m; m0 += TOGETHER) {
                const int64_t count = std::min<int64_t>(TOGETHER, m - m0);
                for (int64_t i = 0; i < (to - from) * count; ++i) total[i] = I::zero();
                for (int64_t p = 0; p < w.panels; ++p) {
                    const uint8_t* piece = w.at(from, p);
                    for (int64_t s = from; s < to; ++s, piece += w.size_of(p))
                        rows<Kind, SPARSE, VALUE, FEW>(piece, w.tiles_of(p), w.group_tiles, x, m0, count,
                                                       p * w.panel_tiles, total + (s - from) * count);
                }
                for (int64_t s = from; s < to; ++s)
                    for (int64_t i = 0; i < count; ++i) finish(w, f, m0 + i, s, total[(s - from) * count + i]);
            }
            from = to;
        }
    }

    static void packed(const Matrix& w, const Activations& x, int64_t m, int64_t first, int64_t last, const Finish& f) {
        if (w.value == FP16) return all<Real, 1, FP16>(w, x, m, first, last, f);
        if (w.value == BF16) return all<Real, 1, BF16>(w, x, m, first, last, f);
        if (x.codes) {
            if (w.sparse && w.value == INT4) return all<Whole, 1, INT4>(w, x, m, first, last, f);
            if (w.sparse) return all<Whole, 1, INT8>(w, x, m, first, last, f);
            if (w.value == INT4) return all<Whole, 0, INT4>(w, x, m, first, last, f);
            return all<Whole, 0, INT8>(w, x, m, first, last, f);
        }
        if (w.sparse && w.value == INT4) return all<Real, 1, INT4>(w, x, m, first, last, f);
        if (w.sparse) return all<Real, 1, INT8>(w, x, m, first, last, f);
        if (w.value == INT4) return all<Real, 0, INT4>(w, x, m, first, last, f);
        return all<Real, 0, INT8>(w, x, m, first, last, f);
    }

    // ------------------------------------------------------------ by way of dense int8

    // A piece to one of dense int8.
    template <int SPARSE, int VALUE>
    struct Spread {
        template <int P>
        static void plane(const uint8_t* tile, uint8_t* to) {
            Bytes code = codes<VALUE, P>(tile + (SPARSE ? 64 : 0));
            if constexpr (VALUE == INT4) code = I::raise(code);  // from + 8 to + 128
            if constexpr (SPARSE) {
                const Bytes fields = I::template fields<P>(I::load(tile));
                I::keep(to + 128 * P, I::template merge<0>(code, fields));
                I::keep(to + 128 * P + 64, I::template merge<1>(code, fields));
            } else {
                I::keep(to + 64 * P, code);
            }
        }
        template <int... P>
        static void planes(const uint8_t* tile, uint8_t* to, std::integer_sequence<int, P...>) {
            (plane<P>(tile, to), ...);
        }
        static void piece(const uint8_t* from, int64_t tiles, int64_t group_tiles, uint8_t* to) {
            for (int64_t t = 0; t < tiles; ++t) {
                if (t % (2 * group_tiles) == 0) {
                    std::memcpy(to, from, LINE);
                    from += LINE, to += LINE;
                }
                planes(from, to, std::make_integer_sequence<int, SPARSE ? 4 : 8>());
                from += tile_bytes(SPARSE, VALUE), to += ROWS * COLUMNS;
            }
        }
    };

    static void spread(const Matrix& w, const Activations& x, int64_t m, int64_t first, int64_t last, const Finish& f,
                       uint8_t* memory) {
        const bool stored = !w.sparse && w.value == INT8;  // as it is needed
        const int64_t size = w.extent(0, ROWS * COLUMNS);
        for (int64_t s = first; s < last; ++s) {
            for (int64_t p = 0; p < w.panels && !stored; ++p) {
                if (w.sparse && w.value == INT4)
                    Spread<1, INT4>::piece(w.at(s, p), w.tiles_of(p), w.group_tiles, memory + p * size);
                else if (w.sparse)
                    Spread<1, INT8>::piece(w.at(s, p), w.tiles_of(p), w.group_tiles, memory + p * size);
                else
                    Spread<0, INT4>::piece(w.at(s, p), w.tiles_of(p), w.group_tiles, memory + p * size);
            }
            for (int64_t m0 = 0; m0 < m; m0 += I::MANY) {
                const int64_t count = std::min<int64_t>(I::MANY, m - m0);
                Floats total[I::MANY];
                for (int64_t i = 0; i < count; ++i) total[i] = I::zero();
                for (int64_t p = 0; p < w.panels; ++p)
                    rows<Whole, 0, INT8, I::MANY>(stored ? w.at(s, p) : memory + p * size, w.tiles_of(p),
                                                  w.group_tiles, x, m0, count, p * w.panel_tiles, total);
                for (int64_t i = 0; i < count; ++i) finish(w, f, m0 + i, s, total[i]);
            }
        }
    }

    // ------------------------------------------------------------ rows of x

    // In whole numbers wherever the order of floats is theirs as well: those are spread over vectors as they stand.
    static void quantize(const float* x, int64_t columns, int64_t tiles, int8_t* codes, float* scales, int32_t* sums) {
        constexpr uint32_t MAGIC = 0x4B400000;  // 12582912.0f
        for (int64_t t = 0; t < tiles; ++t, x += COLUMNS) {
            alignas(64) float filled[COLUMNS] = {};
            const float* from = x;
            if (columns - t * COLUMNS < COLUMNS) {
                std::memcpy(filled, x, static_cast<size_t>(columns - t * COLUMNS) * sizeof(float));
                from = filled;
            }
            Lanes low, high;
            std::memcpy(&low, from, sizeof low);
            std::memcpy(&high, from + ROWS, sizeof high);
            const Words first = (Words)low & 0x7FFFFFFF, second = (Words)high & 0x7FFFFFFF;
            const int32_t bits = reduce(first > second ? first : second, [](auto a, auto b) { return a > b ? a : b; });
            float most;
            std::memcpy(&most, &bits, 4);
            // a block with an Inf or NaN has to give NaN, as it would without codes
            const bool finite = bits < 0x7F800000;
            const float inverse = finite && most > 1e-30f ? 127.0f / most : 0.0f;
            // rounded half to even, into the lower bits of a mantissa
            const Words one = (Words)(low * inverse + 12582912.0f), two = (Words)(high * inverse + 12582912.0f);
            alignas(64) int32_t whole[COLUMNS];
            std::memcpy(whole, &one, sizeof one);
            std::memcpy(whole + ROWS, &two, sizeof two);
            for (int i = 0; i < COLUMNS; ++i) codes[t * COLUMNS + i] = static_cast<int8_t>(whole[i]);
            sums[t] = static_cast<int32_t>(reduce((Modular)one + (Modular)two - 2 * MAGIC, [](auto a, auto b) { return a + b; }));
            scales[t] = finite ? most / 127.0f : NAN;
        }
    }

    // All 16 into one, by halves.
    template <class V, class F>
    static auto reduce(V v, F f) {
        v = f(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
        v = f(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
        v = f(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
        v = f(v, __builtin_shufflevector(v, v, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0));
        return v[0];
    }

    static void normalize(const float* x, const float* norm, float epsilon, int64_t columns, float* y) {
        alignas(64) float part[ROWS] = {};
        int64_t k = 0;
        for (; k + ROWS <= columns; k += ROWS)
            for (int i = 0; i < ROWS; ++i) part[i] += x[k + i] * x[k + i];
        for (; k < columns; ++k) part[k % ROWS] += x[k] * x[k];
        for (int half = ROWS / 2; half; half /= 2)
            for (int i = 0; i < half; ++i) part[i] += part[i + half];
        const float factor = 1.0f / std::sqrt(part[0] / static_cast<float>(columns) + epsilon);
        for (k = 0; k < columns; ++k) y[k] = x[k] * factor * norm[k];
    }

    static uint64_t read(const uint8_t* memory, size_t bytes) {
        typedef uint64_t Line __attribute__((vector_size(64)));
        Line sums[4] = {};
        for (size_t at = 0; at + sizeof sums <= bytes; at += sizeof sums)
            for (size_t i = 0; i < 4; ++i) {
                __builtin_prefetch(memory + at + 8192 + i * sizeof(Line), 0, 3);
                Line line;
                std::memcpy(&line, memory + at + i * sizeof(Line), sizeof line);
                sums[i] += line;
            }
        const Line all = sums[0] + sums[1] + sums[2] + sums[3];
        uint64_t sum = 0;
        for (int i = 0; i < 8; ++i) sum += all[i];
        return sum;
    }

    static constexpr Table table(const char* name) { return {name, packed, spread, quantize, normalize, read}; }
};

}  // namespace edgesft::nm
