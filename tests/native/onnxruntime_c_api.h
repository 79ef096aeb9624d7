// As much of ONNX Runtime's C interface as examples/onnxruntime_c.c uses, for the wheels ship no headers.
//
// OrtApi is a table of functions that only grows; the numbers are the slots of those that are used, and hold
// for every version from API 14 on. Set ORT_INCLUDE to a folder with the real header to test against that.
#pragma once

#include <stddef.h>
#include <stdint.h>

typedef struct OrtStatus OrtStatus;
typedef struct OrtEnv OrtEnv;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtSession OrtSession;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtValue OrtValue;

typedef enum { ORT_LOGGING_LEVEL_ERROR = 3 } OrtLoggingLevel;
typedef enum { OrtArenaAllocator = 1 } OrtAllocatorType;
typedef enum { OrtMemTypeDefault = 0 } OrtMemType;
typedef enum {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7
} ONNXTensorElementDataType;

typedef void (*Unused)(void);

typedef struct {
    Unused from_0[2];
    const char* (*GetErrorMessage)(const OrtStatus*);                                  // 2
    OrtStatus* (*CreateEnv)(OrtLoggingLevel, const char* name, OrtEnv**);              // 3
    Unused from_4[3];
    OrtStatus* (*CreateSession)(const OrtEnv*, const char* path, const OrtSessionOptions*, OrtSession**);  // 7
    Unused from_8[1];
    OrtStatus* (*Run)(OrtSession*, const OrtRunOptions*, const char* const* names, const OrtValue* const* values,
                      size_t count, const char* const* outputs, size_t output_count, OrtValue** out);  // 9
    OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**);                           // 10
    Unused from_11[38];
    OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void* data, size_t bytes, const int64_t* shape,
                                                 size_t rank, ONNXTensorElementDataType, OrtValue**);  // 49
    Unused from_50[1];
    OrtStatus* (*GetTensorMutableData)(OrtValue*, void**);                             // 51
    Unused from_52[17];
    OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**);  // 69
    Unused from_70[158];
    OrtStatus* (*RegisterCustomOpsLibrary_V2)(OrtSessionOptions*, const char* path);   // 228
} OrtApi;

typedef struct {
    const OrtApi* (*GetApi)(uint32_t version);
    const char* (*GetVersionString)(void);
} OrtApiBase;

const OrtApiBase* OrtGetApiBase(void);
