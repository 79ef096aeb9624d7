// Any machine, and the meaning of all others: every instruction set gives these bits.
#include "strips.h"

namespace edgesft::nm {
namespace {

struct Generic {
    struct Bytes {
        uint8_t at[64];
    };
    struct Ints {
        int32_t at[16];
    };
    struct Floats {
        float at[16];
    };
    static constexpr int MANY = 4;

    static Bytes load(const uint8_t* from) {
        Bytes b;
        std::memcpy(b.at, from, 64);
        return b;
    }
    static void keep(uint8_t* to, const Bytes& b) { std::memcpy(to, b.at, 64); }
    static Ints words(const uint8_t* from) {
        Ints v;
        std::memcpy(v.at, from, 64);
        return v;
    }
    static Floats zero() { return spread(0.0f); }
    static Floats spread(float x) {
        Floats v;
        for (float& each : v.at) each = x;
        return v;
    }
    static void store(float* to, const Floats& v) { std::memcpy(to, v.at, sizeof v.at); }
    static Floats halves(const uint8_t* from) {
        Floats v;
        for (int i = 0; i < 16; ++i) {
            uint16_t half;
            std::memcpy(&half, from + 2 * i, 2);
            v.at[i] = widen(half);
        }
        return v;
    }
    static float widen(uint16_t half) {
        const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
        const uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
        float value;
        uint32_t bits;
        if (exponent == 0) {  // subnormal: a whole number of 2^-24
            value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
            std::memcpy(&bits, &value, 4);
            bits |= sign;
        } else {
            bits = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | fraction << 13;
        }
        std::memcpy(&value, &bits, 4);
        return value;
    }
    static Floats brains(const uint8_t* from) {
        Floats v;
        for (int i = 0; i < 16; ++i) {
            uint16_t upper;
            std::memcpy(&upper, from + 2 * i, 2);
            const uint32_t bits = static_cast<uint32_t>(upper) << 16;
            std::memcpy(&v.at[i], &bits, 4);
        }
        return v;
    }
    static Floats floats(const Ints& v) {
        Floats f;
        for (int i = 0; i < 16; ++i) f.at[i] = static_cast<float>(v.at[i]);
        return f;
    }
    static Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
        Floats f;
        for (int i = 0; i < 16; ++i) f.at[i] = std::fma(a.at[i], b.at[i], c.at[i]);
        return f;
    }
    static Bytes low(Bytes b) {
        for (uint8_t& each : b.at) each &= 15;
        return b;
    }
    static Bytes high(Bytes b) {
        for (uint8_t& each : b.at) each = static_cast<uint8_t>(each >> 4);
        return b;
    }
    static Bytes raise(Bytes b) {
        for (uint8_t& each : b.at) each = static_cast<uint8_t>(each + 120);
        return b;
    }
    template <int SHIFT, int BITS>
    static Ints piece(Ints v) {
        for (int32_t& each : v.at)
            each = static_cast<int32_t>(static_cast<uint32_t>(each) >> SHIFT & ((1u << BITS) - 1));
        return v;
    }
    template <int OFFSET>
    static Ints less(Ints v) {
        for (int32_t& each : v.at) each -= OFFSET;
        return v;
    }
    template <int P>
    static Bytes fields(Bytes b) {
        for (uint8_t& each : b.at) each = each >> 2 * P & 3;
        return b;
    }
    template <int P>
    static Bytes place(Bytes b) {
        for (int i = 0; i < 64; ++i) b.at[i] = static_cast<uint8_t>(b.at[i] + (P % 2 ? 8 : 0) + (i % 4 < 2 ? 0 : 4));
        return b;
    }
    static Bytes pick(const int8_t* x, Bytes places) {
        for (uint8_t& each : places.at) each = static_cast<uint8_t>(x[each]);
        return places;
    }
    static Floats among(const float* four, const Ints& place) {
        Floats v;
        for (int i = 0; i < 16; ++i) v.at[i] = four[place.at[i] & 3];
        return v;
    }
    template <int HALF>
    static Bytes merge(const Bytes& codes, const Bytes& fields) {
        Bytes b;
        std::memset(b.at, 128, 64);
        for (int i = 0; i < 64; i += 4)
            for (int s = 2 * HALF; s < 2 * HALF + 2; ++s) b.at[i + fields.at[i + s]] = codes.at[i + s];
        return b;
    }
    template <int OFFSET>
    struct Sparse {
        Ints total;
        void begin(const int32_t*) { std::memset(total.at, 0, sizeof total.at); }
        void add(const Bytes& code, const Bytes& x) {
            for (int i = 0; i < 64; ++i) total.at[i / 4] += (code.at[i] - OFFSET) * static_cast<int8_t>(x.at[i]);
        }
        Ints sum() const { return total; }
    };
    template <int OFFSET>
    struct Dense {
        Ints total;
        void begin(const int32_t*) { std::memset(total.at, 0, sizeof total.at); }
        void add(const Bytes& code, const int8_t* x) {
            for (int i = 0; i < 64; ++i) total.at[i / 4] += (code.at[i] - OFFSET) * x[i % 4];
        }
        Ints sum() const { return total; }
    };
};

}  // namespace

constexpr Table generic = Strips<Generic>::table("generic");

}  // namespace edgesft::nm
