/* One decode step of an exported folder with packed weights, in C: ONNX Runtime and one library of operations.
 *
 *   cc onnxruntime_c.c -I$ORT/include -L$ORT/lib -lonnxruntime -o step
 *   ./step out/x24/model.onnx $(python -m edgesft.kernels.nm_matmul.library) LAYERS KV_HEADS HEAD_DIM VOCABULARY
 *
 * The numbers are those of export.json. It feeds the tokens 1 2 3 4 and prints the most probable next one. With
 * out/x24/model.plain.onnx and - in place of a library it needs none.
 */
#include <onnxruntime_c_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const OrtApi* api;

static void check(OrtStatus* status) {
    if (status == NULL) return;
    fprintf(stderr, "error: %s\n", api->GetErrorMessage(status));
    exit(1);
}

static OrtValue* tensor(const OrtMemoryInfo* memory, void* data, size_t bytes, const int64_t* shape, size_t rank,
                        ONNXTensorElementDataType type) {
    OrtValue* value = NULL;
    check(api->CreateTensorWithDataAsOrtValue(memory, data, bytes, shape, rank, type, &value));
    return value;
}

int main(int count, char** words) {
    if (count != 7) {
        fprintf(stderr, "usage: %s MODEL LIBRARY LAYERS KV_HEADS HEAD_DIM VOCABULARY\n", words[0]);
        return 2;
    }
    const int layers = atoi(words[3]), heads = atoi(words[4]), dim = atoi(words[5]), vocabulary = atoi(words[6]);
    api = OrtGetApiBase()->GetApi(17); /* what the library needs at least */
    OrtEnv* env;
    OrtSessionOptions* options;
    OrtSession* session;
    OrtMemoryInfo* memory;
    check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "edgesft", &env));
    check(api->CreateSessionOptions(&options));
    if (strcmp(words[2], "-") != 0) check(api->RegisterCustomOpsLibrary_V2(options, words[2])); /* the one line */
    check(api->CreateSession(env, words[1], options, &session));
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));

    int64_t ids[] = {1, 2, 3, 4}, mask[] = {1, 1, 1, 1};
    const int64_t shape[] = {1, 4}, empty[] = {1, heads, 0, dim};
    const int inputs = 2 + 2 * layers;
    char(*names)[48] = malloc(sizeof *names * (size_t)inputs);
    const char** pointers = malloc(sizeof *pointers * (size_t)inputs);
    OrtValue** values = malloc(sizeof *values * (size_t)inputs);
    float nothing = 0;
    snprintf(names[0], sizeof names[0], "input_ids");
    snprintf(names[1], sizeof names[1], "attention_mask");
    values[0] = tensor(memory, ids, sizeof ids, shape, 2, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    values[1] = tensor(memory, mask, sizeof mask, shape, 2, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    for (int i = 0; i < 2 * layers; ++i) {
        const char* part = i % 2 ? "value" : "key";
        snprintf(names[2 + i], sizeof names[0], "past_key_values.%d.%s", i / 2, part);
        values[2 + i] = tensor(memory, &nothing, 0, empty, 4, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    }
    for (int i = 0; i < inputs; ++i) pointers[i] = names[i];
    const char* output = "logits";
    OrtValue* logits = NULL;
    check(api->Run(session, NULL, pointers, (const OrtValue* const*)values, (size_t)inputs, &output, 1, &logits));

    float* scores;
    check(api->GetTensorMutableData(logits, (void**)&scores));
    int best = 0;
    for (int i = 1; i < vocabulary; ++i)
        if (scores[i] > scores[best]) best = i;
    printf("next token: %d\n", best);
    return 0;
}
