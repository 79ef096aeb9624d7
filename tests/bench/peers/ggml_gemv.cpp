// Worker: products with Q4_0 matrices by ggml, repacked as it does for its own models. Compiled by the benchmark
// against an installed ggml. Lines `open ROWS COLUMNS THREADS COPIES` and `run M`; the answer to `run` is the
// seconds of one product.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

ggml_backend_buffer_type_t repacked() {
    ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    auto list = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
    for (ggml_backend_buffer_type_t* each = list ? list(device) : nullptr; each && *each; ++each)
        if (std::strstr(ggml_backend_buft_name(*each), "REPACK")) return *each;
    std::fprintf(stderr, "this ggml does not repack\n");
    return ggml_backend_cpu_buffer_type();
}

struct Layers {
    int64_t rows = 0, columns = 0;
    int copies = 0;
    ggml_backend_t backend = nullptr;
    ggml_context* context = nullptr;
    ggml_backend_buffer_t buffer = nullptr;
    std::vector<ggml_tensor*> weights;

    void open(int64_t r, int64_t c, int threads, int n) {
        if (buffer) ggml_backend_buffer_free(buffer);
        if (context) ggml_free(context);
        if (!backend) backend = ggml_backend_cpu_init();
        ggml_backend_cpu_set_n_threads(backend, threads);
        rows = r, columns = c, copies = n;
        context = ggml_init({ggml_tensor_overhead() * static_cast<size_t>(n + 8), nullptr, true});
        weights.clear();
        for (int i = 0; i < n; ++i) weights.push_back(ggml_new_tensor_2d(context, GGML_TYPE_Q4_0, c, r));
        buffer = ggml_backend_alloc_ctx_tensors_from_buft(context, repacked());
        std::mt19937 rng(0);
        std::vector<float> numbers(static_cast<size_t>(r * c));
        for (float& each : numbers) each = static_cast<float>(rng() % 2001) / 1000.0f - 1.0f;
        std::vector<uint8_t> packed(ggml_row_size(GGML_TYPE_Q4_0, c) * static_cast<size_t>(r));
        ggml_quantize_chunk(GGML_TYPE_Q4_0, numbers.data(), packed.data(), 0, r, c, nullptr);
        for (ggml_tensor* each : weights) ggml_backend_tensor_set(each, packed.data(), 0, packed.size());
    }

    double run(int64_t m) {
        const size_t nodes = static_cast<size_t>(copies) + 16;
        ggml_context* graph_context =
            ggml_init({ggml_tensor_overhead() * (nodes + 8) + ggml_graph_overhead_custom(nodes, false), nullptr, true});
        ggml_tensor* x = ggml_new_tensor_2d(graph_context, GGML_TYPE_F32, columns, m);
        ggml_set_input(x);
        ggml_cgraph* graph = ggml_new_graph_custom(graph_context, nodes, false);
        for (ggml_tensor* each : weights) {
            ggml_tensor* y = ggml_mul_mat(graph_context, each, x);
            ggml_set_output(y);
            ggml_build_forward_expand(graph, y);
        }
        ggml_gallocr_t memory = ggml_gallocr_new(ggml_backend_get_default_buffer_type(backend));
        ggml_gallocr_alloc_graph(memory, graph);
        std::vector<float> ones(static_cast<size_t>(columns * m), 0.5f);
        ggml_backend_tensor_set(x, ones.data(), 0, ones.size() * sizeof(float));
        const auto began = std::chrono::steady_clock::now();
        ggml_backend_graph_compute(backend, graph);
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
        ggml_gallocr_free(memory);
        ggml_free(graph_context);
        return took.count() / copies;
    }
};

}  // namespace

int main() {
    Layers layers;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string what;
        words >> what;
        if (what == "open") {
            int64_t rows, columns;
            int threads, copies;
            words >> rows >> columns >> threads >> copies;
            layers.open(rows, columns, threads, copies);
            std::cout << "ok" << std::endl;
        } else {
            int64_t m;
            words >> m;
            std::cout << layers.run(m) << std::endl;
        }
    }
}
