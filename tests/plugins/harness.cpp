// C entries to a plugin object's own enqueue(), for ctypes: made through getCreators() as TensorRT makes it.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <initializer_list>

using namespace nvinfer1;

namespace {

PluginTensorDesc desc(DataType type, std::initializer_list<int64_t> sizes) {
    PluginTensorDesc result{};
    result.type = type;
    result.format = TensorFormat::kLINEAR;
    for (int64_t const size : sizes) {
        result.dims.d[result.dims.nbDims++] = size;
    }
    return result;
}

struct Tensors {
    PluginTensorDesc in[5];
    PluginTensorDesc out[2];

    Tensors(int64_t batch, int64_t heads, int64_t seq_len, int64_t num_kept)
        : in{desc(DataType::kFLOAT, {batch, heads, seq_len}), desc(DataType::kFLOAT, {heads}),
             desc(DataType::kINT64, {batch, seq_len}), desc(DataType::kFLOAT, {batch, seq_len}),
             desc(DataType::kINT64, {num_kept})},
          out{desc(DataType::kINT32, {batch, num_kept}), desc(DataType::kFLOAT, {batch, seq_len})} {}
};

template <typename Capability>
Capability* capability(void* plugin, PluginCapabilityType type) {
    return static_cast<Capability*>(static_cast<IPluginV3*>(plugin)->getCapabilityInterface(type));
}

}  // namespace

#define HAWK_EXPORT extern "C" __attribute__((visibility("default")))

HAWK_EXPORT void* hawk_plugin_create(char const* path, char const* normalization) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);  // stays loaded
    void* const symbol = library == nullptr ? nullptr : dlsym(library, "getCreators");
    if (symbol == nullptr) {
        std::fprintf(stderr, "%s\n", dlerror());
        return nullptr;
    }
    int32_t count = 0;
    auto* const* const creators = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(symbol)(count);
    PluginField const field("normalization", normalization, PluginFieldType::kCHAR,
                            static_cast<int32_t>(std::strlen(normalization)));
    PluginFieldCollection const fields{1, &field};
    return static_cast<IPluginCreatorV3One*>(creators[0])->createPlugin("harness", &fields, TensorRTPhase::kRUNTIME);
}

HAWK_EXPORT std::size_t hawk_plugin_workspace_bytes(void* plugin, int64_t batch, int64_t heads, int64_t seq_len,
                                                    int64_t num_kept) {
    Tensors const tensors(batch, heads, seq_len, num_kept);
    DynamicPluginTensorDesc all[7]{};
    for (int i = 0; i < 7; ++i) {
        all[i].desc = i < 5 ? tensors.in[i] : tensors.out[i - 5];
        all[i].min = all[i].opt = all[i].max = all[i].desc.dims;
    }
    auto* const build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    return build->getWorkspaceSize(all, 5, all + 5, 2);
}

HAWK_EXPORT int32_t hawk_plugin_enqueue(void* plugin, void const* head_scores, void const* head_weights,
                                        void const* visual_rows, void const* select_bias, void* kept_indices,
                                        void* scores, int64_t batch, int64_t heads, int64_t seq_len, int64_t num_kept,
                                        void* workspace, void* stream) {
    Tensors const tensors(batch, heads, seq_len, num_kept);
    void const* const in[5] = {head_scores, head_weights, visual_rows, select_bias, nullptr};  // slots are unread
    void* const out[2] = {kept_indices, scores};
    auto* const runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    return runtime->enqueue(tensors.in, tensors.out, in, out, workspace, static_cast<cudaStream_t>(stream));
}

HAWK_EXPORT void hawk_plugin_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }
