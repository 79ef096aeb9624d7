// NEON: 64 bytes are four registers of four rows. strips_neon_dot.cpp is the same for machines with dotprod.
#include <arm_neon.h>

#include "strips.h"

#ifndef EDGESFT_NEON
#define EDGESFT_NEON neon
#endif
#define EDGESFT_TEXT_(x) #x
#define EDGESFT_TEXT(x) EDGESFT_TEXT_(x)

namespace edgesft::nm {
namespace {

struct Neon {
    struct Bytes {
        uint8x16_t q[4];
    };
    struct Ints {
        int32x4_t q[4];
    };
    struct Floats {
        float32x4_t q[4];
    };
    static constexpr int MANY = 2;

    template <class F>
    static Bytes bytes(F f) {
        return {{f(0), f(1), f(2), f(3)}};
    }
    template <class F>
    static Ints ints(F f) {
        return {{f(0), f(1), f(2), f(3)}};
    }
    template <class F>
    static Floats reals(F f) {
        return {{f(0), f(1), f(2), f(3)}};
    }
    static Bytes load(const uint8_t* from) {
        return bytes([&](int i) { return vld1q_u8(from + 16 * i); });
    }
    static void keep(uint8_t* to, Bytes b) {
        for (int i = 0; i < 4; ++i) vst1q_u8(to + 16 * i, b.q[i]);
    }
    static Ints words(const uint8_t* from) {
        return ints([&](int i) { return vreinterpretq_s32_u8(vld1q_u8(from + 16 * i)); });
    }
    static Floats zero() { return spread(0.0f); }
    static Floats spread(float x) {
        return reals([&](int) { return vdupq_n_f32(x); });
    }
    static void store(float* to, Floats v) {
        for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, v.q[i]);
    }
    static Floats halves(const uint8_t* from) {
        return reals([&](int i) {
            return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from + 8 * i)));
        });
    }
    static Floats brains(const uint8_t* from) {
        return reals([&](int i) {
            return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(from + 8 * i)), 16));
        });
    }
    static Floats floats(Ints v) {
        return reals([&](int i) { return vcvtq_f32_s32(v.q[i]); });
    }
    static Floats multiply_add(Floats a, Floats b, Floats c) {
        return reals([&](int i) { return vfmaq_f32(c.q[i], a.q[i], b.q[i]); });
    }
    static Bytes low(Bytes b) {
        return bytes([&](int i) { return vandq_u8(b.q[i], vdupq_n_u8(15)); });
    }
    static Bytes high(Bytes b) {
        return bytes([&](int i) { return vshrq_n_u8(b.q[i], 4); });
    }
    static Bytes raise(Bytes b) {
        return bytes([&](int i) { return vaddq_u8(b.q[i], vdupq_n_u8(120)); });
    }
    template <int SHIFT, int BITS>
    static Ints piece(Ints v) {
        return ints([&](int i) {
            const uint32x4_t moved = vshlq_u32(vreinterpretq_u32_s32(v.q[i]), vdupq_n_s32(-SHIFT));
            return vreinterpretq_s32_u32(vandq_u32(moved, vdupq_n_u32((1u << BITS) - 1)));
        });
    }
    template <int OFFSET>
    static Ints less(Ints v) {
        return ints([&](int i) { return vsubq_s32(v.q[i], vdupq_n_s32(OFFSET)); });
    }
    template <int P>
    static Bytes fields(Bytes b) {
        return bytes([&](int i) { return vandq_u8(vshlq_u8(b.q[i], vdupq_n_s8(-2 * P)), vdupq_n_u8(3)); });
    }
    template <int P>
    static Bytes place(Bytes b) {
        const uint8x16_t base = vreinterpretq_u8_u32(vdupq_n_u32(P % 2 ? 0x0C0C0808u : 0x04040000u));
        return bytes([&](int i) { return vorrq_u8(b.q[i], base); });
    }
    static Bytes pick(const int8_t* x, Bytes places) {
        const uint8x16_t sixteen = vreinterpretq_u8_s8(vld1q_s8(x));
        return bytes([&](int i) { return vqtbl1q_u8(sixteen, places.q[i]); });
    }
    static Floats among(const float* four, Ints place) {
        const uint8x16_t all = vreinterpretq_u8_f32(vld1q_f32(four));
        return reals([&](int i) {  // a place is four bytes
            const uint32x4_t first = vmulq_n_u32(vreinterpretq_u32_s32(place.q[i]), 0x04040404u);
            const uint32x4_t at = vaddq_u32(first, vdupq_n_u32(0x03020100u));
            return vreinterpretq_f32_u8(vqtbl1q_u8(all, vreinterpretq_u8_u32(at)));
        });
    }
    template <int HALF>
    static Bytes merge(Bytes codes, Bytes fields) {
        const uint8x16_t first = each(2 * HALF), second = each(2 * HALF + 1);
        const uint8x16_t column = vreinterpretq_u8_u32(vdupq_n_u32(0x03020100u));
        return bytes([&](int i) {
            const uint8x16_t one = vceqq_u8(vqtbl1q_u8(fields.q[i], first), column);
            const uint8x16_t two = vceqq_u8(vqtbl1q_u8(fields.q[i], second), column);
            const uint8x16_t made = vbslq_u8(one, vqtbl1q_u8(codes.q[i], first), vdupq_n_u8(128));
            return vbslq_u8(two, vqtbl1q_u8(codes.q[i], second), made);
        });
    }
    static uint8x16_t each(uint32_t s) {  // byte s of every lane, four times
        const uint32_t all = 0x01010101u;
        const uint32_t words[4] = {all * s, all * (s + 4), all * (s + 8), all * (s + 12)};
        return vreinterpretq_u8_u32(vld1q_u32(words));
    }
    static int32x4_t dot(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(__ARM_FEATURE_DOTPROD)
        return vdotq_s32(sum, a, b);
#else
        const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
        const int16x8_t high = vmull_s8(vget_high_s8(a), vget_high_s8(b));
        return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
    }
    template <int OFFSET>
    static int8x16_t weights(uint8x16_t codes) {
        return vreinterpretq_s8_u8(vsubq_u8(codes, vdupq_n_u8(OFFSET)));
    }
    template <int OFFSET>
    struct Sparse {
        Ints total;
        void begin(const int32_t*) {
            total = ints([](int) { return vdupq_n_s32(0); });
        }
        void add(Bytes code, Bytes x) {
            for (int i = 0; i < 4; ++i)
                total.q[i] = dot(total.q[i], weights<OFFSET>(code.q[i]), vreinterpretq_s8_u8(x.q[i]));
        }
        Ints sum() const { return total; }
    };
    template <int OFFSET>
    struct Dense {
        Ints total;
        void begin(const int32_t*) {
            total = ints([](int) { return vdupq_n_s32(0); });
        }
        void add(Bytes code, const int8_t* x) {
            int32_t four;
            std::memcpy(&four, x, 4);
            const int8x16_t word = vreinterpretq_s8_s32(vdupq_n_s32(four));
            for (int i = 0; i < 4; ++i) total.q[i] = dot(total.q[i], weights<OFFSET>(code.q[i]), word);
        }
        Ints sum() const { return total; }
    };
};

}  // namespace

constexpr Table EDGESFT_NEON = Strips<Neon>::table(EDGESFT_TEXT(EDGESFT_NEON));

}  // namespace edgesft::nm
