// hawk::WeightedTopK as a TensorRT plugin (IPluginV3): shapes, types and refusals; the arithmetic is the kernel's.
//
//   in   head_scores  float32 [batch, heads, seq_len]      out  kept_indices  int32   [batch, num_kept]
//        head_weights float32 [heads]                           scores        float32 [batch, seq_len]
//        visual_rows  int64   [batch, seq_len]
//        select_bias  float32 [batch, seq_len]
//        slots        int64   [num_kept], unread: its length is num_kept
//   field normalization: "l2" (default), "softmax" or "minmax"
//
// One source for TensorRT 10.3 to 11.x, and no TensorRT library to link: it calls nothing of the plugin registry
// and of the logger, whose virtual tables differ between majors. What it refuses it says on stderr.
#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>

#include "weighted_topk_kernel.cuh"

static_assert(NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR >= 1003, "the plugin needs TensorRT 10.3 or newer");

namespace {

using namespace nvinfer1;

constexpr char const* kName = "WeightedTopK";
constexpr char const* kVersion = "1";
constexpr char const* kNamespace = "";
constexpr char const* kNormalizationField = "normalization";
constexpr char const* kNormalizations[] = {"l2", "softmax", "minmax"};  // in the order of hawk::Normalization

enum Input : int32_t { kHeadScores, kHeadWeights, kVisualRows, kSelectBias, kSlots, kInputs };
enum Output : int32_t { kKeptIndices, kScores, kOutputs };

struct Binding {
    char const* name;
    DataType type;
    char const* type_name;
    int32_t rank;
};

constexpr Binding kBindings[kInputs + kOutputs] = {
    {"head_scores", DataType::kFLOAT, "float32", 3}, {"head_weights", DataType::kFLOAT, "float32", 1},
    {"visual_rows", DataType::kINT64, "int64", 2},   {"select_bias", DataType::kFLOAT, "float32", 2},
    {"slots", DataType::kINT64, "int64", 1},         {"kept_indices", DataType::kINT32, "int32", 2},
    {"scores", DataType::kFLOAT, "float32", 2},
};

constexpr int32_t kRefused = -1;

// Says on stderr why a call is refused; one line a refusal.
__attribute__((format(printf, 1, 2))) int32_t refuse(char const* format, ...) noexcept {
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "hawk::%s: %s\n", kName, line);
    return kRefused;
}

int32_t refuse_counts(int32_t inputs, int32_t outputs) noexcept {
    return refuse("got %d inputs and %d outputs, expected %d and %d", inputs, outputs, kInputs, kOutputs);
}

// A type's name, or its number: the numbers of the others differ between versions.
char const* type_name(DataType type) noexcept {
    for (Binding const& binding : kBindings) {
        if (binding.type == type) {
            return binding.type_name;
        }
    }
    return type == DataType::kHALF ? "float16" : type == DataType::kBF16 ? "bfloat16" : "another type";
}

int32_t check_type_and_rank(int32_t position, DataType type, int32_t rank) noexcept {
    Binding const& expected = kBindings[position];
    if (type != expected.type || rank != expected.rank) {
        return refuse("%s is %s with %d dimensions, expected %s with %d", expected.name, type_name(type), rank,
                      expected.type_name, expected.rank);
    }
    return 0;
}

int32_t check_dimension(int32_t position, int32_t axis, int64_t got, char const* word, int64_t expected) noexcept {
    if (got != expected) {
        return refuse("dimension %d of %s is %lld, expected %s = %lld", axis, kBindings[position].name,
                      static_cast<long long>(got), word, static_cast<long long>(expected));
    }
    return 0;
}

int32_t check_at_most(char const* word, int64_t got, char const* limit_word, int64_t limit) noexcept {
    if (got > limit) {
        return refuse("%s = %lld, expected at most %s = %lld", word, static_cast<long long>(got), limit_word,
                      static_cast<long long>(limit));
    }
    return 0;
}

int32_t check_num_kept(char const* word, int64_t got) noexcept {
    return got >= 1 ? 0 : refuse("%s = %lld, expected at least 1", word, static_cast<long long>(got));
}

int32_t check_sizes(hawk::WeightedTopKSizes const& sizes) noexcept {
    if (check_num_kept("num_kept (the length of slots)", sizes.num_kept) != 0 ||
        check_at_most("num_kept (the length of slots)", sizes.num_kept, "seq_len", sizes.seq_len) != 0 ||
        check_at_most("heads", sizes.heads, "the kernel's limit", hawk::kMaxHeads) != 0 ||
        check_at_most("batch", sizes.batch, "the kernel's limit", hawk::kMaxBatch) != 0 ||
        check_at_most("seq_len", sizes.seq_len, "the kernel's limit", hawk::kMaxSeqLen) != 0) {
        return kRefused;
    }
    return 0;
}

// The sizes that the descriptions agree on, or a refusal.
int32_t read_sizes(PluginTensorDesc const* in, PluginTensorDesc const* out, hawk::WeightedTopKSizes& sizes) noexcept {
    for (int32_t i = 0; i < kInputs + kOutputs; ++i) {
        PluginTensorDesc const& desc = i < kInputs ? in[i] : out[i - kInputs];
        if (check_type_and_rank(i, desc.type, desc.dims.nbDims) != 0) {
            return kRefused;
        }
    }
    sizes = {in[kHeadScores].dims.d[0], in[kHeadScores].dims.d[1], in[kHeadScores].dims.d[2], in[kSlots].dims.d[0]};
    if (check_dimension(kHeadWeights, 0, in[kHeadWeights].dims.d[0], "heads", sizes.heads) != 0 ||
        check_dimension(kVisualRows, 0, in[kVisualRows].dims.d[0], "batch", sizes.batch) != 0 ||
        check_dimension(kVisualRows, 1, in[kVisualRows].dims.d[1], "seq_len", sizes.seq_len) != 0 ||
        check_dimension(kSelectBias, 0, in[kSelectBias].dims.d[0], "batch", sizes.batch) != 0 ||
        check_dimension(kSelectBias, 1, in[kSelectBias].dims.d[1], "seq_len", sizes.seq_len) != 0 ||
        check_dimension(kInputs + kKeptIndices, 0, out[kKeptIndices].dims.d[0], "batch", sizes.batch) != 0 ||
        check_dimension(kInputs + kKeptIndices, 1, out[kKeptIndices].dims.d[1], "num_kept", sizes.num_kept) != 0 ||
        check_dimension(kInputs + kScores, 0, out[kScores].dims.d[0], "batch", sizes.batch) != 0 ||
        check_dimension(kInputs + kScores, 1, out[kScores].dims.d[1], "seq_len", sizes.seq_len) != 0) {
        return kRefused;
    }
    return check_sizes(sizes);
}

class WeightedTopK final : public IPluginV3,
                           public IPluginV3OneCore,
                           public IPluginV3OneBuild,
                           public IPluginV3OneRuntime {
  public:
    explicit WeightedTopK(hawk::Normalization normalization) noexcept : normalization_(normalization) {
        char const* const name = kNormalizations[static_cast<int32_t>(normalization)];
        field_ =
            PluginField(kNormalizationField, name, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(name)));
        fields_ = {1, &field_};
    }
    WeightedTopK(WeightedTopK const&) = delete;
    WeightedTopK& operator=(WeightedTopK const&) = delete;

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE:
                return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD:
                return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME:
                return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override { return new (std::nothrow) WeightedTopK(normalization_); }

    // core
    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

    // build
    int32_t getNbOutputs() const noexcept override { return kOutputs; }

    int32_t getOutputDataTypes(DataType* types, int32_t outputs, DataType const*,
                               int32_t inputs) const noexcept override {
        if (inputs != kInputs || outputs != kOutputs) {
            return refuse_counts(inputs, outputs);
        }
        for (int32_t i = 0; i < kOutputs; ++i) {
            types[i] = kBindings[kInputs + i].type;
        }
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* in, int32_t inputs, DimsExprs const*, int32_t, DimsExprs* out,
                            int32_t outputs, IExprBuilder&) noexcept override {
        if (inputs != kInputs || outputs != kOutputs) {
            return refuse_counts(inputs, outputs);
        }
        for (int32_t i = 0; i < kInputs; ++i) {
            if (in[i].nbDims != kBindings[i].rank) {
                return refuse("%s has %d dimensions, expected %d", kBindings[i].name, in[i].nbDims, kBindings[i].rank);
            }
        }
        out[kKeptIndices].nbDims = 2;
        out[kKeptIndices].d[0] = in[kHeadScores].d[0];
        out[kKeptIndices].d[1] = in[kSlots].d[0];
        out[kScores].nbDims = 2;
        out[kScores].d[0] = in[kHeadScores].d[0];
        out[kScores].d[1] = in[kHeadScores].d[2];
        return 0;
    }

    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t inputs,
                                   int32_t outputs) noexcept override {
        if (inputs != kInputs || outputs != kOutputs || position < 0 || position >= kInputs + kOutputs) {
            return false;
        }
        PluginTensorDesc const& desc = tensors[position].desc;
        return desc.format == TensorFormat::kLINEAR && desc.type == kBindings[position].type;
    }

    // Shapes may still be ranges here: what is wrong at both ends of a range is wrong.
    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t inputs, DynamicPluginTensorDesc const* out,
                            int32_t outputs) noexcept override {
        if (inputs != kInputs || outputs != kOutputs) {
            return refuse_counts(inputs, outputs);
        }
        for (int32_t i = 0; i < kInputs + kOutputs; ++i) {
            PluginTensorDesc const& desc = i < kInputs ? in[i].desc : out[i - kInputs].desc;
            if (check_type_and_rank(i, desc.type, desc.dims.nbDims) != 0) {
                return kRefused;
            }
        }
        if (check_num_kept("the largest num_kept (the length of slots)", in[kSlots].max.d[0]) != 0) {
            return kRefused;
        }
        return check_at_most("the smallest num_kept (the length of slots)", in[kSlots].min.d[0], "the largest seq_len",
                             in[kHeadScores].max.d[2]);
    }

    // TensorRT adds shapes and formats; the field is all else that decides which code runs.
    char const* getTimingCacheID() noexcept override { return kNormalizations[static_cast<int32_t>(normalization_)]; }

    std::size_t getWorkspaceSize(DynamicPluginTensorDesc const* in, int32_t, DynamicPluginTensorDesc const*,
                                 int32_t) const noexcept override {
        Dims const& most = in[kHeadScores].max;
        return hawk::weighted_topk_workspace_bytes(most.d[0], most.d[1], most.d[2]);
    }

    // runtime
    int32_t onShapeChange(PluginTensorDesc const* in, int32_t inputs, PluginTensorDesc const* out,
                          int32_t outputs) noexcept override {
        if (inputs != kInputs || outputs != kOutputs) {
            return refuse_counts(inputs, outputs);
        }
        hawk::WeightedTopKSizes sizes{};
        return read_sizes(in, out, sizes);
    }

    int32_t enqueue(PluginTensorDesc const* in_desc, PluginTensorDesc const* out_desc, void const* const* in,
                    void* const* out, void* workspace, cudaStream_t stream) noexcept override {
        hawk::WeightedTopKSizes sizes{};
        if (read_sizes(in_desc, out_desc, sizes) != 0) {
            return kRefused;
        }
        hawk::WeightedTopKTensors const tensors{
            static_cast<float const*>(in[kHeadScores]),   static_cast<float const*>(in[kHeadWeights]),
            static_cast<int64_t const*>(in[kVisualRows]), static_cast<float const*>(in[kSelectBias]),
            static_cast<int32_t*>(out[kKeptIndices]),     static_cast<float*>(out[kScores]),
        };
        cudaError_t const status = hawk::weighted_topk(normalization_, tensors, sizes, workspace, stream);
        return status == cudaSuccess ? 0 : refuse("CUDA: %s", cudaGetErrorString(status));
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &fields_; }

  private:
    hawk::Normalization normalization_;
    PluginField field_;
    PluginFieldCollection fields_{};
};

// A field's characters, without the zero that some callers count.
bool equals(PluginField const& field, char const* text) noexcept {
    std::size_t length = static_cast<std::size_t>(field.length);
    char const* const data = static_cast<char const*>(field.data);
    if (length > 0 && data[length - 1] == '\0') {
        --length;
    }
    return length == std::strlen(text) && std::memcmp(data, text, length) == 0;
}

class WeightedTopKCreator final : public IPluginCreatorV3One {
  public:
    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept override {
        hawk::Normalization normalization = hawk::Normalization::kL2;
        for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
            if (!read_field(fields->fields[i], normalization)) {
                return nullptr;
            }
        }
        return new (std::nothrow) WeightedTopK(normalization);
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return &fields_; }
    AsciiChar const* getPluginName() const noexcept override { return kName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNamespace; }

  private:
    static bool read_field(PluginField const& field, hawk::Normalization& normalization) noexcept {
        if (std::strcmp(field.name, kNormalizationField) != 0) {
            refuse("field %s, expected only %s", field.name, kNormalizationField);
            return false;
        }
        if (field.type != PluginFieldType::kCHAR || field.data == nullptr || field.length < 1) {
            refuse("field %s has no characters, expected l2, softmax or minmax", kNormalizationField);
            return false;
        }
        for (int32_t i = 0; i < 3; ++i) {
            if (equals(field, kNormalizations[i])) {
                normalization = static_cast<hawk::Normalization>(i);
                return true;
            }
        }
        refuse("normalization is %.*s, expected l2, softmax or minmax", static_cast<int>(field.length),
               static_cast<char const*>(field.data));
        return false;
    }

    PluginField field_{kNormalizationField, nullptr, PluginFieldType::kCHAR, 1};
    PluginFieldCollection fields_{1, &field_};
};

}  // namespace

#define HAWK_EXPORT extern "C" __attribute__((visibility("default")))

// What IPluginRegistry::loadLibrary looks for.
HAWK_EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static WeightedTopKCreator creator;
    static IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}

HAWK_EXPORT void setLoggerFinder(ILoggerFinder*) {}  // asked for by the loader; the logger is not used
