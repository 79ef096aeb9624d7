// Perturbed strips of a weight, updates of a weight, and their replay: one pass over memory each.
//
// reference.py beside this file is the specification; results agree with it bit for bit: keep the order of
// operations. Plain C interface, loaded through ctypes. All work is done in pieces of 256 entries that stay in
// the first-level cache; inner loops are branch-free and left to the vectoriser.

#include "pieces.h"

namespace {

constexpr int64_t PARALLEL = 1 << 15;  // fewer entries than this are not worth waking threads for
constexpr int64_t STRIP = 1 << 16;     // entries that stay in the second-level cache while updates pass

template <bool KEEP>
inline bool inside(const Rule& rule, float w, const uint8_t* bytes, int i) {
    const float size = std::fabs(w);
    const bool in = (size >= rule.low) & (size <= rule.high);  // false for NaN
    return KEEP ? in & (bytes[i] < rule.keep) : in;
}

inline bool choose(const Rule& rule, const Key& key, const Part& part, Cell& cell) {
    if (rule.keep >= 256) return false;
    mask_bytes(key, rule.tensor, static_cast<uint64_t>(part.origin / 16), PIECE / 16, cell.bytes);
    return true;
}

inline void put(float* to, float x) { *to = x; }
inline void put(uint16_t* to, float x) { *to = to_bf16(x); }

// to = w + scale z in the mask, else w; without weights: scale z in the mask, else 0.
template <bool KEEP, bool BARE, class Out>
void emit(const Rule& rule, const Part& part, const float* w, const uint8_t* bytes, const float* z, float scale,
          Out* __restrict to) {
#pragma omp simd
    for (int i = part.begin; i < part.end; ++i) {
        const float moved = scale * z[i], at = w[i];
        put(to + i, inside<KEEP>(rule, at, bytes, i) ? (BARE ? moved : at + moved) : (BARE ? 0.0f : at));
    }
}

// `emit` of a whole piece of random signs, that are never numbers of their own.
template <bool KEEP, class Out>
void emit_signs(const Rule& rule, const float* w, const uint8_t* bytes, const uint32_t* words, float scale,
                Out* __restrict to) {
    for (int i = 0; i < PIECE; i += 32) {
        const uint32_t word = words[i / 32];
#pragma omp simd
        for (int j = 0; j < 32; ++j) {
            const float at = w[i + j], moved = at + signed_by(scale, word, j);
            put(to + i + j, inside<KEEP>(rule, at, bytes, i + j) ? moved : at);
        }
    }
}

template <class Out>
void write(const Rule& rule, const Part& part, const float* w, const uint8_t* bytes, const float* z, float scale,
           bool keep, bool bare, Out* to) {
    if (bare) {
        keep ? emit<true, true>(rule, part, w, bytes, z, scale, to)
             : emit<false, true>(rule, part, w, bytes, z, scale, to);
    } else {
        keep ? emit<true, false>(rule, part, w, bytes, z, scale, to)
             : emit<false, false>(rule, part, w, bytes, z, scale, to);
    }
}

template <class Out>
void copy(const Part& part, const float* w, bool bare, Out* to) {
#pragma omp simd
    for (int i = part.begin; i < part.end; ++i) put(to + i, bare ? 0.0f : w[i]);
}

// Ask for what the piece after the next will need, which hides latency behind the arithmetic. No address is
// wrong: a prefetch beyond the end does nothing.
template <class T>
inline void fetch(const T* from, const Part& part) {
    for (int i = part.begin; i < part.end; i += 64 / static_cast<int>(sizeof(T)))
        __builtin_prefetch(from + i + 2 * PIECE);
}

template <bool KEEP>
int count(const Rule& rule, const Part& part, const float* w, const uint8_t* bytes) {
    int active = 0;
#pragma omp simd reduction(+ : active)
    for (int i = part.begin; i < part.end; ++i) active += inside<KEEP>(rule, w[i], bytes, i);
    return active;
}

// w = shrink w + scale z in the mask, in place.
template <bool KEEP>
void move(const Rule& rule, const Part& part, float* w, const uint8_t* bytes, const float* z, float scale,
          float shrink) {
#pragma omp simd
    for (int i = part.begin; i < part.end; ++i) {
        const float before = w[i], after = shrink * before + scale * z[i];
        w[i] = inside<KEEP>(rule, before, bytes, i) ? after : before;
    }
}

// `move` of a whole piece by random signs, that are never numbers of their own.
template <bool KEEP>
void move_signs(const Rule& rule, float* w, const uint8_t* bytes, const uint32_t* words, float scale, float shrink) {
    for (int i = 0; i < PIECE; i += 32) {
        const uint32_t word = words[i / 32];
#pragma omp simd
        for (int j = 0; j < 32; ++j) {
            const float before = w[i + j], after = shrink * before + signed_by(scale, word, j);
            w[i + j] = inside<KEEP>(rule, before, bytes, i + j) ? after : before;
        }
    }
}

template <bool KEEP>
void move_bf16(const Rule& rule, const Part& part, uint16_t* stored, const Cell& cell, const float* z, float scale,
               float shrink, bool rounds) {
#pragma omp simd
    for (int i = part.begin; i < part.end; ++i) {
        const float before = cell.w[i], after = shrink * before + scale * z[i];
        const bool in = inside<KEEP>(rule, before, cell.bytes, i);
        const uint16_t rounded = rounds ? to_bf16(after, cell.random[i]) : to_bf16(after);
        stored[i] = in ? rounded : stored[i];
    }
}

template <bool KEEP>
void move_codes(const Rule& rule, const Part& part, Cell& cell, const float* z, float scale, float shrink,
                bool rounds, float low, float high) {
#pragma omp simd
    for (int i = part.begin; i < part.end; ++i) {
        const float before = cell.w[i], after = shrink * before + scale * z[i];
        const bool in = inside<KEEP>(rule, before, cell.bytes, i);
        const float code = rounds ? to_code(after, cell.scale[i], low, high, cell.random[i])
                                  : to_code(after, cell.scale[i], low, high);
        // Without a scale no code says anything: it stays.
        const bool put = in & (cell.scale[i] != 0.0f) & (code == code);
        cell.code[i] = put ? static_cast<int32_t>(put ? code : 0.0f) : cell.code[i];
    }
}

// Makes ready what is added in a piece: scale * z, in the order of the terms.
const float* total(const Part& part, const Term* terms, const Step& step, std::vector<Source>& sources, Cell& cell,
                   float& scale) {
    if (step.count == 1) {
        sources[0].unit(part, cell.z);
        scale = terms[0].scale;
        return cell.z;
    }
    scale = 1.0f;
    for (int i = 0; i < PIECE; ++i) cell.sum[i] = -0.0f;  // changes nothing it is added to
    for (int64_t t = 0; t < step.count; ++t) {
        sources[static_cast<size_t>(t)].unit(part, cell.z);
        const float each = terms[t].scale;
#pragma omp simd
        for (int i = part.begin; i < part.end; ++i) cell.sum[i] = cell.sum[i] + each * cell.z[i];
    }
    return cell.sum;
}

// One step on one piece; returns the entries in the mask if they are `wanted`.
int descend(const Matrix& m, const Part& part, const Term* terms, const Step& step, std::vector<Source>& sources,
            const Rule& rule, const Key& chooser, const Key& rounder, bool wanted, Cell& cell) {
    const float* w = load(m, part, cell);
    const float shrink = step.shrink;
    const bool keep = choose(rule, chooser, part, cell);
    const auto active = [&] {
        return !wanted ? 0 : keep ? count<true>(rule, part, w, cell.bytes) : count<false>(rule, part, w, cell.bytes);
    };
    if (m.type == FLOAT32) {
        float* to = static_cast<float*>(m.data) + part.origin;
        if (step.count == 1 && sources[0].is_signs() && part.whole()) {
            fetch(w, part);
            const int found = active();
            const auto run = keep ? move_signs<true> : move_signs<false>;
            run(rule, to, cell.bytes, sources[0].bits(part), terms[0].scale, shrink);
            return found;
        }
        fetch(w, part);
        float scale;
        const float* z = total(part, terms, step, sources, cell, scale);
        const int found = active();
        const auto run = keep ? move<true> : move<false>;
        run(rule, part, to, cell.bytes, z, scale, shrink);
        return found;
    }
    float scale;
    const float* z = total(part, terms, step, sources, cell, scale);
    const int found = active();
    const bool rounds = step.rounds != 0;
    if (rounds)
        rounding_words(rounder, rule.tensor, static_cast<uint64_t>(part.origin / 4), BLOCKS, cell.random);
    if (m.type == BFLOAT16) {
        uint16_t* to = static_cast<uint16_t*>(m.data) + part.origin;
        const auto run = keep ? move_bf16<true> : move_bf16<false>;
        run(rule, part, to, cell, z, scale, shrink, rounds);
        return found;
    }
    const float low = m.type == INT8 ? -127.0f : -8.0f, high = m.type == INT8 ? 127.0f : 7.0f;
    const auto run = keep ? move_codes<true> : move_codes<false>;
    run(rule, part, cell, z, scale, shrink, rounds, low, high);
    store_codes(m, part, cell);
    return found;
}

// Copies of rows at some of the directions, out of one reading of the weight.
template <class Out>
void strip(const Matrix& m, int64_t start, int64_t stop, const Term* terms, int64_t count, void* const* outs,
           int64_t origin, std::vector<Source>& sources, const std::vector<int>& which, const Rule& rule,
           const Key& chooser, bool bare, Cell& cell) {
    for (Source& each : sources) each.range(start, stop);
    pieces(start, stop, [&](const Part& part) {
        if (m.type == FLOAT32) fetch(static_cast<const float*>(m.data) + part.origin, part);
        if (m.type == BFLOAT16) fetch(static_cast<const uint16_t*>(m.data) + part.origin, part);
        const int64_t at = part.origin - origin;
        const float* w = nullptr;
        bool keep = false;
        for (int source = -1; source < static_cast<int>(sources.size()); ++source) {
            Source* drawn = source < 0 ? nullptr : &sources[static_cast<size_t>(source)];
            const bool as_bits = drawn && drawn->is_signs() && part.whole() && !bare;
            if (drawn && !as_bits) drawn->unit(part, cell.z);
            if (w == nullptr) {  // after the first noise, while the prefetch is on its way
                w = load(m, part, cell);
                keep = choose(rule, chooser, part, cell);
            }
            for (int64_t t = 0; t < count; ++t) {
                if (which[static_cast<size_t>(t)] != source) continue;
                Out* to = static_cast<Out*>(outs[t]) + at;
                if (source < 0)
                    copy(part, w, bare, to);
                else if (as_bits)
                    (keep ? emit_signs<true, Out> : emit_signs<false, Out>)(rule, w, cell.bytes, drawn->bits(part),
                                                                           terms[t].scale, to);
                else
                    write(rule, part, w, cell.bytes, cell.z, terms[t].scale, keep, bare, to);
            }
        }
    });
}

// The distinct directions among the terms, and which of them each term is (-1: none).
std::vector<int> distinct(const Term* terms, int64_t count, uint32_t tensor, int64_t width,
                          std::vector<Source>& sources) {
    std::vector<int> which;
    for (int64_t t = 0; t < count; ++t) {
        int found = terms[t].law == NONE ? -1 : 0;
        while (found >= 0 && found < static_cast<int>(sources.size()) &&
               !sources[static_cast<size_t>(found)].draws(terms[t]))
            ++found;
        if (found == static_cast<int>(sources.size())) sources.emplace_back(terms[t], tensor, width);
        which.push_back(found);
    }
    return which;
}

}  // namespace

extern "C" {

// 1 when built with OpenMP.
int edgesft_parallel() {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

// to[i] = z(start + i), 0 <= i < count, of a tensor with rows of `width` entries.
void edgesft_noise(float* to, int64_t start, int64_t count, int64_t width, const Term* term, uint32_t tensor,
                   int threads) {
    const int64_t stop = start + count, first = start / TILE, last = (stop + TILE - 1) / TILE;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1 && count >= PARALLEL)
    {
        Source source(*term, tensor, width);
        alignas(64) float z[PIECE];
#pragma omp for schedule(static)
        for (int64_t tile = first; tile < last; ++tile) {
            const int64_t begin = tile * TILE < start ? start : tile * TILE;
            const int64_t end = (tile + 1) * TILE < stop ? (tile + 1) * TILE : stop;
            source.range(begin, end);
            pieces(begin, end, [&](const Part& part) {
                source.unit(part, z);
                std::memcpy(to + (part.origin + part.begin - start), z + part.begin,
                            sizeof(float) * static_cast<size_t>(part.end - part.begin));
            });
        }
    }
}

// outs[t] (end - begin, width) = rows [begin, end) of the weight + scale z of term t, in float32 (out_type 0) or
// rounded to bfloat16 (1); with `bare` the masked scale z alone.
void edgesft_strips(const Matrix* matrix, int64_t begin, int64_t end, const Term* terms, int64_t count,
                    void* const* outs, int out_type, const Rule* rule, int bare, int threads) {
    const Matrix m = *matrix;
    const int64_t start = begin * m.width, stop = end * m.width;
    const int64_t first = start / TILE, last = (stop + TILE - 1) / TILE;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1 && stop - start >= PARALLEL)
    {
        std::vector<Source> sources;
        const std::vector<int> which = distinct(terms, count, rule->tensor, m.width, sources);
        const Key chooser(rule->seed);
        Cell cell;
#pragma omp for schedule(static)
        for (int64_t tile = first; tile < last; ++tile) {
            const int64_t from = tile * TILE < start ? start : tile * TILE;
            const int64_t to = (tile + 1) * TILE < stop ? (tile + 1) * TILE : stop;
            const auto make = out_type == FLOAT32 ? strip<float> : strip<uint16_t>;
            make(m, from, to, terms, count, outs, start, sources, which, *rule, chooser, bare != 0, cell);
        }
    }
}

// The steps one after the other, in place; returns the entries in the mask of the last one.
int64_t edgesft_replay(const Matrix* matrix, const Term* terms, const Step* steps, int64_t count, const Rule* rule,
                       int threads) {
    const Matrix m = *matrix;
    const int64_t total = m.rows * m.width;
    int64_t size = STRIP;
    if (m.type >= INT8)  // two entries of a row may share a byte, which one thread must write
        size = (STRIP / m.width > 0 ? STRIP / m.width : 1) * m.width;
    int64_t active = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) reduction(+ : active) if (threads > 1 && total * count >= PARALLEL)
    {
        std::vector<Source> sources;
        const Key chooser(rule->seed);
        Cell cell;
#pragma omp for schedule(static)
        for (int64_t strip = 0; strip < (total + size - 1) / size; ++strip) {
            const int64_t start = strip * size, stop = start + size < total ? start + size : total;
            for (int64_t s = 0; s < count; ++s) {
                const Step& step = steps[s];
                const Key rounder(step.rounding);
                sources.clear();
                for (int64_t t = 0; t < step.count; ++t) {
                    sources.emplace_back(terms[step.first + t], rule->tensor, m.width);
                    sources.back().range(start, stop);
                }
                const bool last = s == count - 1;
                pieces(start, stop, [&](const Part& part) {
                    active += descend(m, part, terms + step.first, step, sources, *rule, chooser, rounder, last,
                                      cell);
                });
            }
        }
    }
    return active;
}

}  // extern "C"
