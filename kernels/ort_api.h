// The C interface of ONNX Runtime, as much of it as the operations here need.
//
// The wheel of ONNX Runtime ships no headers. The interface is a table of functions that only grows, so the few
// slots needed are named here by number (onnxruntime_c_api.h, struct OrtApi; unchanged since API 17).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ort {

constexpr uint32_t VERSION = 17;
constexpr int FAIL = 1, INVALID_ARGUMENT = 2;  // OrtErrorCode
constexpr int FLOAT = 1, UINT8 = 2, INT64 = 7, FLOAT16 = 10;  // ONNXTensorElementDataType
constexpr int REQUIRED = 0, OPTIONAL = 1;      // OrtCustomOpInputOutputCharacteristic

struct Status;
struct Base {
    const void* const* (*table)(uint32_t version);
    const char* (*version)();
};

// The functions, by slot.
class Api {
  public:
    explicit Api(const void* const* table) : table_(table) {}

    Status* status(int code, const char* text) const { return at<Status* (*)(int, const char*)>(0)(code, text); }
    Status* domain(const char* name, void** out) const { return at<Status* (*)(const char*, void**)>(26)(name, out); }
    Status* add(void* domain, const void* op) const { return at<Status* (*)(void*, const void*)>(27)(domain, op); }
    Status* use(void* options, void* domain) const { return at<Status* (*)(void*, void*)>(28)(options, domain); }
    Status* data(const void* value, void** out) const { return at<Status* (*)(const void*, void**)>(51)(value, out); }
    Status* kind(const void* info, int* out) const { return at<Status* (*)(const void*, int*)>(60)(info, out); }
    Status* rank(const void* info, size_t* out) const { return at<Status* (*)(const void*, size_t*)>(61)(info, out); }
    Status* sizes(const void* info, int64_t* out, size_t rank) const {
        return at<Status* (*)(const void*, int64_t*, size_t)>(62)(info, out, rank);
    }
    Status* info(const void* value, void** out) const { return at<Status* (*)(const void*, void**)>(65)(value, out); }
    void release_info(void* info) const { at<void (*)(void*)>(99)(info); }
    Status* real(const void* info, const char* name, float* out) const {
        return at<Status* (*)(const void*, const char*, float*)>(85)(info, name, out);
    }
    Status* integer(const void* info, const char* name, int64_t* out) const {
        return at<Status* (*)(const void*, const char*, int64_t*)>(86)(info, name, out);
    }
    void release_status(Status* status) const { at<void (*)(Status*)>(93)(status); }
    Status* inputs(const void* context, size_t* out) const {
        return at<Status* (*)(const void*, size_t*)>(88)(context, out);
    }
    Status* input(const void* context, size_t index, const void** out) const {
        return at<Status* (*)(const void*, size_t, const void**)>(90)(context, index, out);
    }
    Status* output(void* context, size_t index, const int64_t* sizes, size_t rank, void** out) const {
        return at<Status* (*)(void*, size_t, const int64_t*, size_t, void**)>(91)(context, index, sizes, rank, out);
    }
    Status* node_inputs(const void* info, size_t* out) const {
        return at<Status* (*)(const void*, size_t*)>(230)(info, out);
    }
    // A constant input while the kernel is made: `constant` is 0 and `value` null where it is none.
    Status* constant(const void* info, size_t index, int* constant, const void** value) const {
        using F = Status* (*)(const void*, size_t, int*, const void**);
        return at<F>(249)(info, index, constant, value);
    }
    Status* parallel(const void* context, void (*f)(void*, size_t), size_t count, void* what) const {
        using F = Status* (*)(const void*, void (*)(void*, size_t), size_t, size_t, void*);
        return at<F>(274)(context, f, count, 0, what);
    }

  private:
    template <class F>
    F at(int slot) const {
        F function;
        std::memcpy(&function, table_ + slot, sizeof function);
        return function;
    }

    const void* const* table_;
};

// struct OrtCustomOp as of version 17.
struct CustomOp {
    uint32_t version;
    void* (*create)(const CustomOp*, const void* api, const void* info);
    const char* (*name)(const CustomOp*);
    const char* (*provider)(const CustomOp*);
    int (*input_type)(const CustomOp*, size_t);
    size_t (*inputs)(const CustomOp*);
    int (*output_type)(const CustomOp*, size_t);
    size_t (*outputs)(const CustomOp*);
    void (*compute)(void* kernel, void* context);
    void (*destroy)(void* kernel);
    int (*input_kind)(const CustomOp*, size_t);
    int (*output_kind)(const CustomOp*, size_t);
    int (*input_memory)(const CustomOp*, size_t);
    int (*input_arity)(const CustomOp*);
    int (*input_homogeneity)(const CustomOp*);
    int (*output_arity)(const CustomOp*);
    int (*output_homogeneity)(const CustomOp*);
    Status* (*create_checked)(const CustomOp*, const void* api, const void* info, void** kernel);
    Status* (*compute_checked)(void* kernel, void* context);
    Status* (*infer)(const CustomOp*, void* context);
    int (*first_version)(const CustomOp*);
    int (*last_version)(const CustomOp*);
};

}  // namespace ort

#define EDGESFT_TRY(call)                                \
    do {                                                 \
        if (ort::Status* failed = (call)) return failed; \
    } while (0)
