// A compiled decoder: what the manifest and the index say, its tensors, and its sequence.
#pragma once

#include <sys/auxv.h>
#include <sys/utsname.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "files.h"
#include "json.h"

namespace carve {

namespace ffi = tvm::ffi;

constexpr size_t kAlignment = 64;  // kernels load whole vectors

struct Description {
  int64_t vocab_size, max_length, layers, heads, width;
  std::optional<int64_t> begin;
  std::vector<int64_t> ends;
  size_t gates = 0;
};

// The model's folder: its manifest, and the files that it lists.
class Folder {
 public:
  explicit Folder(const std::string& path) : root_(resolved(path)) {
    Mapped file(inside(root_, "manifest.json"));
    manifest_ = parse_json(file.bytes(), "manifest.json");
    manifest_.count_at("schema", 1, 1);
    if (manifest_.text_at("kind") != "decoder") throw BadModel("the model is no decoder");
  }

  const Json& manifest() const { return manifest_; }
  bool lists(const std::string& name) const {
    return manifest_.object_at("files").find(name) != nullptr;
  }
  std::string path(const std::string& name) const {
    if (!lists(name)) throw BadModel("the manifest does not list " + name);
    return inside(root_, name);
  }
  void check(const std::string& name, const Mapped& file) const {
    if (sha256(file.bytes()) != manifest_.object_at("files").text_at(name))
      throw BadModel(name + " is not the file that the manifest lists (SHA-256)");
  }
  // A file whose content has been compared with the manifest.
  std::unique_ptr<Mapped> open(const std::string& name, bool verify = true) const {
    auto file = std::make_unique<Mapped>(path(name));
    if (verify) check(name, *file);
    return file;
  }
  void check_all() const {
    for (const auto& name : manifest_.object_at("files").keys) open(name);
  }

  Description description() const {
    const Json& m = manifest_.object_at("model");
    Description d;
    d.vocab_size = m.count_at("vocab_size", 1, 1 << 24);
    d.max_length = m.count_at("max_length", 1, INT32_MAX);
    d.layers = m.count_at("num_layers", 1, 1 << 12);
    d.heads = m.count_at("num_key_value_heads", 1, 1 << 16);
    d.width = m.count_at("head_dim", 1, 1 << 16);
    if (const Json* begin = m.find("bos_token_id"); begin && begin->kind != Json::Kind::null)
      d.begin = m.count_at("bos_token_id", 0, d.vocab_size - 1);
    if (const Json* ends = m.find("eos_token_ids"); ends && ends->kind != Json::Kind::null)
      for (const Json& id : m.list_at("eos_token_ids")) {
        if (id.kind != Json::Kind::whole) throw BadModel("eos_token_ids must be numbers");
        d.ends.push_back(id.number);
      }
    if (const Json* gates = m.find("gates"); gates && gates->kind != Json::Kind::null)
      d.gates = m.list_at("gates").size();
    return d;
  }

 private:
  std::string root_;
  Json manifest_;
};

// Memory of this process as a tensor; `alive` is kept until the last user of it is gone.
inline ffi::Tensor lend(void* data, DLDataType type, std::vector<int64_t> shape,
                        std::shared_ptr<void> alive) {
  struct Lent {
    DLManagedTensor managed;
    std::vector<int64_t> shape;
    std::shared_ptr<void> alive;
  };
  auto* lent = new Lent{{}, std::move(shape), std::move(alive)};
  DLTensor& t = lent->managed.dl_tensor;
  t.data = data;
  t.device = {kDLCPU, 0};
  t.ndim = static_cast<int32_t>(lent->shape.size());
  t.dtype = type;
  t.shape = lent->shape.data();
  lent->managed.manager_ctx = lent;
  lent->managed.deleter = [](DLManagedTensor* self) { delete static_cast<Lent*>(self->manager_ctx); };
  return ffi::Tensor::FromDLPack(&lent->managed, kAlignment, true);
}

// Zeros that start where kernels may load whole vectors.
inline std::shared_ptr<void> zeros(size_t bytes) {
  size_t whole = (bytes + kAlignment) / kAlignment * kAlignment;
  void* data = std::aligned_alloc(kAlignment, whole);
  if (data == nullptr) throw std::bad_alloc();
  std::memset(data, 0, whole);
  return {data, std::free};
}

constexpr DLDataType kFloat{kDLFloat, 32, 1}, kInt64{kDLInt, 64, 1};

// The tensors of a safetensors file that kernels can read, as views of its pages.
inline std::map<std::string, ffi::Tensor> map_tensors(std::shared_ptr<Mapped> file) {
  static const std::map<std::string, DLDataType> types = {
      {"F32", kFloat},          {"I64", kInt64},        {"I32", {kDLInt, 32, 1}},
      {"I8", {kDLInt, 8, 1}},   {"U8", {kDLUInt, 8, 1}}, {"BOOL", {kDLBool, 8, 1}}};
  std::string_view bytes = file->bytes();
  uint64_t length = 0;
  if (bytes.size() < 8) throw BadModel("the weights are no safetensors file");
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(bytes[i]);
  if (length > bytes.size() - 8) throw BadModel("the weights are no safetensors file");
  Json header = parse_json(bytes.substr(8, length), "the weights' header");
  std::string_view data = bytes.substr(8 + length);
  std::map<std::string, ffi::Tensor> found;
  for (size_t i = 0; i < header.keys.size(); ++i) {
    const std::string& name = header.keys[i];
    if (name == "__metadata__") continue;
    const Json& entry = header.items[i];
    auto type = types.find(entry.text_at("dtype"));
    if (type == types.end()) throw BadModel("the weights have a type that is not known");
    std::vector<int64_t> shape;
    unsigned __int128 size = (type->second.bits + 7) / 8;
    const auto& sides = entry.list_at("shape");
    const auto& ends = entry.list_at("data_offsets");
    bool sound = sides.size() <= 8 && ends.size() == 2;
    for (const Json& side : sides) {
      sound = sound && side.kind == Json::Kind::whole && side.number >= 0;
      if (!sound || (side.number > 0 && size > UINT64_MAX / uint64_t(side.number))) {
        sound = false;
        break;
      }
      size *= uint64_t(side.number);
      shape.push_back(side.number);
    }
    sound = sound && ends[0].kind == Json::Kind::whole && ends[1].kind == Json::Kind::whole &&
            0 <= ends[0].number && ends[0].number <= ends[1].number &&
            uint64_t(ends[1].number) <= data.size() &&
            size == uint64_t(ends[1].number - ends[0].number);
    if (!sound) throw BadModel("the weights do not lie where their header says");
    // Kernels do not write to weights, and these pages could not be written to.
    char* start = const_cast<char*>(data.data()) + ends[0].number;
    // What fills up between tensors lies anywhere.
    if (reinterpret_cast<uintptr_t>(start) % kAlignment == 0)
      found.emplace(name, lend(start, type->second, std::move(shape), file));
  }
  return found;
}

// Whether this processor has what Linux calls `flag`.
inline bool processor_has(const std::string& flag) {
#ifdef __aarch64__
  // An emulator's /proc/cpuinfo is the host's.
  if (flag == "asimd") return getauxval(AT_HWCAP) & HWCAP_ASIMD;
  if (flag == "asimddp") return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#endif
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    if (line.compare(0, 5, "flags") && line.compare(0, 8, "Features")) continue;
    std::istringstream words(line.substr(colon + 1));
    for (std::string word; words >> word;)
      if (word == flag) return true;
    return false;
  }
  return false;
}

class Model {
 public:
  // `verify`: compare all files with the manifest; the library, which is code, and the index are
  // compared in any case.
  Model(const Folder& folder, int threads, bool verify) : about(folder.description()) {
    if (verify) folder.check_all();
    const Json& targets = folder.manifest().object_at("targets");
    const Json* target = nullptr;
    for (size_t i = 0; i < targets.keys.size() && target == nullptr; ++i)
      if (targets.keys[i].compare(0, 4, "tvm:") == 0) target = &targets.items[i];
    if (target == nullptr) throw BadModel("the model holds no target of TVM");
    const std::string& index_name = target->text_at("model");
    Json index = parse_json(folder.open(index_name)->bytes(), index_name);
    index.count_at("schema", 1, 1);
    if (index.find("device") != nullptr) throw BadModel("the model is for a GPU");
    check_processor(index);
    size_t slash = index_name.rfind('/');
    std::string home = slash == std::string::npos ? "" : index_name.substr(0, slash + 1);
    std::string library = home + index.text_at("library");
    std::unique_ptr<Mapped> code = folder.open(library);
    std::shared_ptr<Mapped> weights = folder.open(home + index.text_at("tensors"), false);
    check_ports(index);
    auto executable = ffi::Module::LoadFromFile(folder.path(library));
    if (!code->is_still(folder.path(library))) throw BadModel(library + " changed meanwhile");
    auto load = executable->GetFunction("vm_load_executable");
    if (!load) throw BadModel(library + " is no library of carve's");
    machine_ = (*load)().cast<ffi::Module>();
    auto prepare = (*machine_)->GetFunction("vm_initialization");
    if (!prepare) throw BadModel(library + " is no library of carve's");
    (*prepare)(static_cast<int>(kDLCPU), 0, 2);  // 2: an allocator that keeps what it frees
    ffi::Function::GetGlobalRequired("runtime.config_threadpool")(1, threads);
    std::map<std::string, ffi::Tensor> tensors = map_tensors(weights);
    for (Step* step : {&decode, &prefill}) {
      auto run = (*machine_)->GetFunction(step->name);
      if (!run) throw BadModel("the library has no function " + step->name);
      step->run = *run;
      for (const Json& name : index.object_at("functions").list_at(step->name)) {
        auto found = tensors.find(name.string);
        if (found == tensors.end())
          throw BadModel("the weights have no tensor " + name.string + " where kernels can read it");
        step->weights.push_back(found->second);
      }
    }
  }

  struct Step {
    std::string name;
    ffi::Function run{};
    std::vector<ffi::Tensor> weights{};
  };
  Description about;
  Step decode{"decode"}, prefill{"prefill"};

 private:
  static void check_processor(const Json& index) {
    utsname system{};
    uname(&system);
    std::string lost;
    if (index.text_at("machine") != system.machine) lost = index.text_at("machine");
    for (const Json& flag : index.list_at("flags"))
      if (lost.empty() && !processor_has(flag.string)) lost = flag.string;
    if (!lost.empty())
      throw BadModel(index.text_at("target") + " is for another processor than this: no " + lost);
  }

  // The caches are what the manifest says of them, or kernels would write elsewhere.
  void check_ports(const Json& index) const {
    std::map<std::string, const Json*> ports;
    for (const char* side : {"inputs", "outputs"})
      for (const Json& port : index.list_at(side)) ports[port.text_at("name")] = &port;
    auto fits = [&](const std::string& name, const std::vector<int64_t>& due) {
      auto found = ports.find(name);
      if (found == ports.end() || found->second->text_at("dtype") != "tensor(float)") return false;
      const auto& shape = found->second->list_at("shape");
      if (shape.size() != due.size()) return false;
      for (size_t i = 0; i < due.size(); ++i)
        if (due[i] >= 0 && (shape[i].kind != Json::Kind::whole || shape[i].number != due[i]))
          return false;
      return true;
    };
    bool sound = fits("logits", {-1, -1, about.vocab_size});
    for (int64_t layer = 0; layer < about.layers; ++layer)
      for (const char* part : {".key", ".value"})
        sound = sound && fits("past_key_values." + std::to_string(layer) + part,
                              {-1, about.heads, -1, about.width});
    sound = sound && (ports.count("gate_shift") != 0) == (about.gates != 0);
    sound = sound && !fits("past_key_values." + std::to_string(about.layers) + ".key", {-1, -1, -1, -1});
    if (!sound) throw BadModel("the index does not match the manifest");
  }

  std::optional<ffi::Module> machine_;
};

// One sequence, with a cache that compiled functions write in place.
class Session {
 public:
  // `open_gates`: no block is skipped.
  Session(Model& model, bool open_gates) : model_(model) {
    const Description& d = model.about;
    for (auto& one : ones_) one = zeros(sizeof(int64_t));
    if (d.gates) {
      auto data = zeros(d.gates * sizeof(float));
      // Above any score.
      if (open_gates) std::fill_n(static_cast<float*>(data.get()), d.gates, 1e20f);
      shift_ = lend(data.get(), kFloat, {static_cast<int64_t>(d.gates)}, data);
    }
    grow(0);
  }

  int64_t length() const { return length_; }

  // Append tokens; logits [rows, V] after the last `rows` of them.
  std::vector<float> step(const int64_t* ids, int64_t count, int64_t rows) {
    const Description& d = model_.about;
    for (int64_t i = 0; i < count; ++i)
      if (ids[i] < 0 || ids[i] >= d.vocab_size)
        throw BadRequest("token " + std::to_string(ids[i]) + " is not in the vocabulary of " +
                         std::to_string(d.vocab_size));
    int64_t total = length_ + count;
    if (total > d.max_length)
      throw BadRequest(std::to_string(total) + " tokens do not fit the model's context of " +
                       std::to_string(d.max_length));
    if (total > capacity_) grow(total);
    Model::Step& step = count == 1 ? model_.decode : model_.prefill;
    std::vector<ffi::Any> given;
    auto tokens = count == 1 ? ones_[0] : zeros(size_t(count) * sizeof(int64_t));
    auto places = count == 1 ? ones_[1] : zeros(size_t(count) * sizeof(int64_t));
    for (int64_t i = 0; i < count; ++i) {
      static_cast<int64_t*>(tokens.get())[i] = ids[i];
      static_cast<int64_t*>(places.get())[i] = length_ + i;
    }
    given.emplace_back(lend(tokens.get(), kInt64, {1, count}, tokens));
    given.emplace_back(lend(places.get(), kInt64, {1, count}, places));
    if (count > 1) given.emplace_back(ffi::Shape({rows}));
    if (shift_) given.emplace_back(*shift_);
    for (const auto& cache : caches_) given.emplace_back(cache);
    for (const auto& weight : step.weights) given.emplace_back(weight);
    std::vector<ffi::AnyView> views(given.begin(), given.end());
    ffi::Any result;
    step.run.CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);
    auto logits = result.cast<ffi::Array<ffi::Any>>()[0].cast<ffi::Tensor>();
    if (logits.dtype() != kFloat || logits.numel() != rows * d.vocab_size)
      throw BadModel("the library gives other logits than the index says");
    length_ = total;
    const auto* data = static_cast<const float*>(logits.data_ptr());
    std::vector<float> copy(data, data + rows * d.vocab_size);
    // The sizes of one token are always the same; those of a prompt are not met again.
    if (count > 1) ffi::Function::GetGlobalRequired("vm.builtin.memory_manager.clear")();
    return copy;
  }

 private:
  // Room for `total` tokens; every doubling copies what is valid once.
  void grow(int64_t total) {
    const Description& d = model_.about;
    int64_t capacity = std::min(std::max({int64_t{256}, 2 * capacity_, total}), d.max_length);
    std::vector<ffi::Tensor> made;
    for (int64_t i = 0; i < 2 * d.layers; ++i) {
      auto data = zeros(size_t(d.heads) * size_t(capacity) * size_t(d.width) * sizeof(float));
      auto* to = static_cast<float*>(data.get());
      for (int64_t h = 0; h < d.heads && length_; ++h)
        std::memcpy(to + h * capacity * d.width,
                    static_cast<float*>(caches_[i].data_ptr()) + h * capacity_ * d.width,
                    size_t(length_) * size_t(d.width) * sizeof(float));
      made.push_back(lend(to, kFloat, {1, d.heads, capacity, d.width}, data));
    }
    caches_ = std::move(made);
    capacity_ = capacity;
  }

  Model& model_;
  int64_t length_ = 0, capacity_ = 0;
  std::shared_ptr<void> ones_[2];
  std::optional<ffi::Tensor> shift_;
  std::vector<ffi::Tensor> caches_;
};

}  // namespace carve
