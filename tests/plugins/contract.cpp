// The plugin's contract, through getCreators() alone: no TensorRT library, no GPU.
//   contract libhawk_trt_plugin.so [libnvinfer_lean.so.N]
// With a lean runtime, the plugin goes through its real registry as well. Prints what holds; 1 at the first that
// does not.
#include <NvInferRuntime.h>
#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

namespace {

using namespace nvinfer1;

void require(bool holds, std::string const& what) {
    std::printf("%s %s\n", holds ? "  ok    " : "  FAILED", what.c_str());
    if (!holds) {
        std::exit(1);
    }
}

// A dimension that is known, as the builder would hand it over.
struct KnownDimension final : apiv::VDimensionExpr, IDimensionExpr {
    explicit KnownDimension(int64_t value) : value_(value) { IDimensionExpr::mImpl = this; }
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }

  private:
    int64_t value_;
};

// The plugin computes no dimension, so a call of this is a failure.
struct NoExpressions final : apiv::VExprBuilder, IExprBuilder {
    NoExpressions() { IExprBuilder::mImpl = this; }
    IDimensionExpr const* constant(int64_t) override { return nullptr; }
    IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
        return nullptr;
    }
};

std::deque<KnownDimension> dimensions;

DimsExprs expressions(std::initializer_list<int64_t> sizes) {
    DimsExprs result{};
    for (int64_t const size : sizes) {
        dimensions.emplace_back(size);
        result.d[result.nbDims++] = &dimensions.back();
    }
    return result;
}

Dims dims(std::initializer_list<int64_t> sizes) {
    Dims result{};
    for (int64_t const size : sizes) {
        result.d[result.nbDims++] = size;
    }
    return result;
}

PluginTensorDesc desc(DataType type, std::initializer_list<int64_t> sizes) {
    PluginTensorDesc result{};
    result.type = type;
    result.format = TensorFormat::kLINEAR;
    result.dims = dims(sizes);
    return result;
}

// What a call wrote to stderr.
std::string said(std::function<void()> const& call) {
    std::fflush(stderr);
    int const kept = dup(STDERR_FILENO);
    std::FILE* const file = std::tmpfile();
    dup2(fileno(file), STDERR_FILENO);
    call();
    std::fflush(stderr);
    dup2(kept, STDERR_FILENO);
    close(kept);
    std::string text(4096, '\0');
    std::rewind(file);
    text.resize(std::fread(&text[0], 1, text.size(), file));
    std::fclose(file);
    return text;
}

template <typename Capability>
Capability* capability(IPluginV3* plugin, PluginCapabilityType type) {
    return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

using Plugin = std::unique_ptr<IPluginV3>;

Plugin create(IPluginCreatorV3One* creator, PluginFieldCollection const* fields, TensorRTPhase phase) {
    return Plugin(creator->createPlugin("node", fields, phase));
}

Plugin create(IPluginCreatorV3One* creator, char const* name, void const* data, PluginFieldType type, int32_t length) {
    PluginField const field(name, data, type, length);
    PluginFieldCollection const fields{1, &field};
    return create(creator, &fields, TensorRTPhase::kBUILD);
}

std::string normalization_of(IPluginV3* plugin) {
    auto* const runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    PluginFieldCollection const* const fields = runtime->getFieldsToSerialize();
    require(fields->nbFields == 1 && std::string(fields->fields[0].name) == "normalization", "one field is serialised");
    return std::string(static_cast<char const*>(fields->fields[0].data), fields->fields[0].length);
}

void check_fields(IPluginCreatorV3One* creator) {
    PluginFieldCollection const* const names = creator->getFieldNames();
    require(names->nbFields == 1 && std::string(names->fields[0].name) == "normalization" &&
                names->fields[0].type == PluginFieldType::kCHAR,
            "the creator lists the field normalization");
    require(normalization_of(create(creator, nullptr, TensorRTPhase::kBUILD).get()) == "l2", "l2 without fields");
    for (char const* const name : {"l2", "softmax", "minmax"}) {
        int32_t const length = static_cast<int32_t>(std::strlen(name));
        Plugin const plugin = create(creator, "normalization", name, PluginFieldType::kCHAR, length);
        require(plugin && normalization_of(plugin.get()) == name, std::string(name) + " is taken");
        Plugin const with_zero = create(creator, "normalization", name, PluginFieldType::kCHAR, length + 1);
        require(with_zero && normalization_of(with_zero.get()) == name, std::string(name) + " with its zero too");
        auto* const runtime = capability<IPluginV3OneRuntime>(plugin.get(), PluginCapabilityType::kRUNTIME);
        Plugin const again = create(creator, runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
        require(again && normalization_of(again.get()) == name, std::string(name) + " survives serialisation");
        require(normalization_of(Plugin(again->clone()).get()) == name, std::string(name) + " survives clone");
        require(normalization_of(Plugin(runtime->attachToContext(nullptr)).get()) == name,
                std::string(name) + " survives attachToContext");
    }
    int32_t const number = 1;
    std::string const text = said([&] {
        require(!create(creator, "normalization", "l1", PluginFieldType::kCHAR, 2), "l1 is refused");
        require(!create(creator, "normalization", "", PluginFieldType::kCHAR, 0), "an empty name is refused");
        require(!create(creator, "normalization", &number, PluginFieldType::kINT32, 1), "a number is refused");
        require(!create(creator, "top_k", &number, PluginFieldType::kINT32, 1), "another field is refused");
    });
    require(text.find("normalization is l1, expected l2, softmax or minmax") != std::string::npos, "and says why");
}

struct Tensors {
    PluginTensorDesc in[5] = {desc(DataType::kFLOAT, {2, 28, 1300}), desc(DataType::kFLOAT, {28}),
                              desc(DataType::kINT64, {2, 1300}), desc(DataType::kFLOAT, {2, 1300}),
                              desc(DataType::kINT64, {260})};
    PluginTensorDesc out[2] = {desc(DataType::kINT32, {2, 260}), desc(DataType::kFLOAT, {2, 1300})};
};

void check_build(IPluginV3* plugin) {
    auto* const build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    require(build->getNbOutputs() == 2, "two outputs");
    DataType const in_types[5] = {DataType::kFLOAT, DataType::kFLOAT, DataType::kINT64, DataType::kFLOAT,
                                  DataType::kINT64};
    DataType types[2];
    require(build->getOutputDataTypes(types, 2, in_types, 5) == 0 && types[0] == DataType::kINT32 &&
                types[1] == DataType::kFLOAT,
            "kept_indices are int32, scores float32");

    NoExpressions none;
    DimsExprs const in[5] = {expressions({2, 28, 1300}), expressions({28}), expressions({2, 1300}),
                             expressions({2, 1300}), expressions({260})};
    DimsExprs out[2];
    require(build->getOutputShapes(in, 5, nullptr, 0, out, 2, none) == 0 && out[0].nbDims == 2 &&
                out[0].d[0]->getConstantValue() == 2 && out[0].d[1]->getConstantValue() == 260 && out[1].nbDims == 2 &&
                out[1].d[0]->getConstantValue() == 2 && out[1].d[1]->getConstantValue() == 1300,
            "shapes follow from batch, seq_len and the length of slots");

    Tensors const good;
    DynamicPluginTensorDesc all[7]{};
    for (int i = 0; i < 7; ++i) {
        all[i].desc = i < 5 ? good.in[i] : good.out[i - 5];
        all[i].min = all[i].max = all[i].opt = all[i].desc.dims;
    }
    for (int i = 0; i < 7; ++i) {
        require(build->supportsFormatCombination(i, all, 5, 2), "format " + std::to_string(i) + " is supported");
        DataType const type = all[i].desc.type;
        for (DataType const other : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT32,
                                     DataType::kINT64, DataType::kBOOL}) {
            all[i].desc.type = other;
            if (other != type && build->supportsFormatCombination(i, all, 5, 2)) {
                require(false, "format " + std::to_string(i) + " in another type is refused");
            }
        }
        all[i].desc.type = type;
        all[i].desc.format = TensorFormat::kCHW32;
        require(!build->supportsFormatCombination(i, all, 5, 2), "only in its type, and linear");
        all[i].desc.format = TensorFormat::kLINEAR;
    }
    require(build->configurePlugin(all, 5, all + 5, 2) == 0, "a profile is accepted");
    std::size_t const bytes = build->getWorkspaceSize(all, 5, all + 5, 2);
    require(bytes >= 2 * 1300 * sizeof(uint32_t), "workspace " + std::to_string(bytes) + " bytes");
    for (DynamicPluginTensorDesc& tensor : all) {
        tensor.min.d[tensor.min.nbDims - 1] = 1;
    }
    require(build->getWorkspaceSize(all, 5, all + 5, 2) == bytes, "which is that of the largest shapes");
    require(std::string(build->getTimingCacheID()) == normalization_of(plugin),
            "timings are kept, a normalization each");
    all[4].min = all[4].max = dims({0});
    std::string const none_kept = said(
        [&] { require(build->configurePlugin(all, 5, all + 5, 2) != 0, "a profile that keeps nothing is refused"); });
    require(none_kept.find("num_kept (the length of slots) = 0, expected at least 1") != std::string::npos, "and why");
    all[4].min = all[4].max = dims({1301});
    std::string const text = said([&] {
        require(build->configurePlugin(all, 5, all + 5, 2) != 0, "a profile that keeps more than there is, is refused");
    });
    require(text.find("1301") != std::string::npos && text.find("1300") != std::string::npos, "with both values");
}

void refused(IPluginV3OneRuntime* runtime, char const* what, std::function<void(Tensors&)> const& change,
             std::initializer_list<char const*> words) {
    Tensors tensors;
    change(tensors);
    std::string const text = said([&] {
        require(runtime->onShapeChange(tensors.in, 5, tensors.out, 2) != 0, what + std::string(" is refused"));
    });
    for (char const* const word : words) {
        require(text.find(word) != std::string::npos, std::string("and says ") + word);
    }
    // enqueue looks for itself: null pointers would crash it otherwise
    void const* const in[5]{};
    void* const out[2]{};
    said([&] {
        require(runtime->enqueue(tensors.in, tensors.out, in, out, nullptr, nullptr) != 0, "by enqueue as well");
    });
}

void check_runtime(IPluginV3* plugin) {
    auto* const runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    Tensors const good;
    require(runtime->onShapeChange(good.in, 5, good.out, 2) == 0, "matching shapes are accepted");
    refused(runtime, "K above S",
            [](Tensors& t) {
                t.in[4].dims = dims({1301});
                t.out[0].dims = dims({2, 1301});
            },
            {"1301", "seq_len = 1300"});
    refused(runtime, "K = 0",
            [](Tensors& t) {
                t.in[4].dims = dims({0});
                t.out[0].dims = dims({2, 0});
            },
            {"num_kept (the length of slots) = 0", "at least 1"});
    refused(runtime, "a float16 score", [](Tensors& t) { t.in[0].type = DataType::kHALF; },
            {"head_scores", "float16", "expected float32"});
    refused(runtime, "int32 visual_rows", [](Tensors& t) { t.in[2].type = DataType::kINT32; },
            {"visual_rows", "int32", "int64"});
    refused(runtime, "scores of two dimensions", [](Tensors& t) { t.in[0].dims = dims({28, 1300}); },
            {"head_scores", "2 dimensions", "with 3"});
    refused(runtime, "another number of weights", [](Tensors& t) { t.in[1].dims = dims({16}); },
            {"head_weights", "16", "heads = 28"});
    refused(runtime, "another batch", [](Tensors& t) { t.in[2].dims = dims({1, 1300}); },
            {"visual_rows", "1", "batch = 2"});
    refused(runtime, "another length", [](Tensors& t) { t.in[3].dims = dims({2, 1299}); },
            {"select_bias", "1299", "seq_len = 1300"});
    refused(runtime, "another output", [](Tensors& t) { t.out[0].dims = dims({2, 259}); },
            {"kept_indices", "259", "num_kept = 260"});
    refused(runtime, "more heads than the kernel takes",
            [](Tensors& t) {
                t.in[0].dims = dims({2, 1025, 1300});
                t.in[1].dims = dims({1025});
            },
            {"heads = 1025", "1024"});
    said([&] {
        require(runtime->onShapeChange(good.in, 4, good.out, 2) != 0, "four inputs are refused");
        require(runtime->onShapeChange(good.in, 5, good.out, 1) != 0, "one output is refused");
    });
}

void check_creator(IPluginCreatorInterface* interface) {
    require(std::string(interface->getInterfaceInfo().kind) == "PLUGIN CREATOR_V3ONE", "it is an IPluginCreatorV3One");
    auto* const creator = static_cast<IPluginCreatorV3One*>(interface);
    require(std::string(creator->getPluginName()) == "WeightedTopK", "its name is WeightedTopK");
    require(std::string(creator->getPluginVersion()) == "1", "its version is 1");
    require(std::string(creator->getPluginNamespace()).empty(), "its namespace is empty");
    check_fields(creator);
    Plugin const plugin = create(creator, nullptr, TensorRTPhase::kBUILD);
    auto* const core = capability<IPluginV3OneCore>(plugin.get(), PluginCapabilityType::kCORE);
    require(std::string(core->getPluginName()) == "WeightedTopK" && std::string(core->getPluginVersion()) == "1" &&
                std::string(core->getPluginNamespace()).empty(),
            "the plugin has the creator's name, version and namespace");
    check_build(plugin.get());
    check_runtime(plugin.get());
}

void* open_library(char const* path, int scope) {
    void* const library = dlopen(path, RTLD_NOW | scope);
    require(library != nullptr, "loads " + std::string(library == nullptr ? dlerror() : path));
    return library;
}

void check_registry(char const* plugin_path, char const* runtime_path) {
    void* const library = open_library(runtime_path, RTLD_GLOBAL);
    auto const version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
    auto const registry_of = reinterpret_cast<IPluginRegistry* (*)()>(dlsym(library, "getPluginRegistry"));
    require(version != nullptr && registry_of != nullptr, "it is a TensorRT runtime");
    std::printf("  runtime %d, headers %d.%d\n", version(), NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR);
    IPluginRegistry* const registry = registry_of();
    for (int round = 0; round < 2; ++round) {
        require(registry->getCreator("WeightedTopK", "1", "") == nullptr, "the registry does not know it yet");
        auto const handle = registry->loadLibrary(plugin_path);
        require(handle != nullptr, "loadLibrary");
        IPluginCreatorInterface* const creator = registry->getCreator("WeightedTopK", "1", "");
        require(creator != nullptr, "getCreator");
        check_creator(creator);
        registry->deregisterLibrary(handle);
    }
    require(registry->getCreator("WeightedTopK", "1", "") == nullptr, "deregisterLibrary");
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 2) {
        std::fprintf(stderr, "usage: contract libhawk_trt_plugin.so [libnvinfer_lean.so.N]\n");
        return 2;
    }
    void* const library = open_library(arguments[1], RTLD_LOCAL);
    auto const creators_of =
        reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    auto const set_finder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    require(creators_of != nullptr && set_finder != nullptr, "exports getCreators and setLoggerFinder");
    set_finder(nullptr);
    int32_t number = 0;
    IPluginCreatorInterface* const* const creators = creators_of(number);
    require(number == 1, "one creator");
    check_creator(creators[0]);
    if (count > 2) {
        check_registry(arguments[1], arguments[2]);
    }
    return 0;
}
