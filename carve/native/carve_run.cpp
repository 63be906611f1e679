// carve-run: generate with a decoder that carve compiled, over TVM's runtime alone.

#include <cinttypes>
#include <chrono>
#include <cstdio>
#include <functional>
#include <iostream>
#include <iterator>
#include <random>
#include <thread>

#include "json.h"
#include "model.h"
#include "sampler.h"
#include "tokenizer.h"

namespace {

using carve::BadRequest;
using Clock = std::chrono::steady_clock;
const Clock::time_point kStart = Clock::now();

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

const char* kUsage =
    "usage: carve-run [--prompt TEXT | --ids LIST] [options]   (default: the prompt from standard "
    "input)\n"
    "  --model DIR       the model's folder (default: where this program is)\n"
    "  --ids LIST        the prompt as token ids; ids come out as well\n"
    "  --ids-out         token ids come out, not text\n"
    "  --max-tokens N    at most so many new tokens (default: 128)\n"
    "  --temperature T   0 is greedy (default)\n"
    "  --top-k K         sample from so many tokens; 0 does not restrict (default)\n"
    "  --top-p P         sample from this much probability; 1 does not restrict (default)\n"
    "  --seed S          makes sampling reproducible\n"
    "  --gates MODE      token (default), or off: no block is skipped\n"
    "  --threads N       threads of one kernel (default: every core)\n"
    "  --verify          compare the weights with the manifest's SHA-256 as well\n"
    "  --stats           one JSON object on standard error at the end\n"
    "  --logits FILE     generate nothing: float32 logits [tokens, vocabulary] of the prompt\n"
    "  --encode          generate nothing: texts from standard input, ended by NUL, as ids\n"
    "  --decode          generate nothing: ids from standard input, a line each, as texts\n";

struct Options {
  std::string model, prompt, ids, logits, gates = "token";
  bool has_prompt = false, has_ids = false, ids_out = false, verify = false, stats = false;
  bool encode = false, decode = false, help = false;
  int64_t max_tokens = 128, top_k = 0, threads = 0;
  std::optional<uint64_t> seed;
  double temperature = 0, top_p = 1;
};

template <typename Number>
Number number(const std::string& name, const std::string& text) {
  Number value{};
  auto [end, bad] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (bad != std::errc() || end != text.data() + text.size())
    throw BadRequest(name + " takes a number, not '" + text + "'");
  return value;
}

Options parse(int argc, char** argv) {
  Options o;
  for (int i = 1; i < argc; ++i) {
    std::string name = argv[i];
    auto value = [&]() -> std::string {
      if (++i >= argc) throw BadRequest(name + " takes a value");
      return argv[i];
    };
    const std::map<std::string, std::function<void()>> known = {
        {"--model", [&] { o.model = value(); }},
        {"--prompt", [&] { o.prompt = value(), o.has_prompt = true; }},
        {"--ids", [&] { o.ids = value(), o.has_ids = o.ids_out = true; }},
        {"--ids-out", [&] { o.ids_out = true; }},
        {"--max-tokens", [&] { o.max_tokens = number<int64_t>(name, value()); }},
        {"--temperature", [&] { o.temperature = number<double>(name, value()); }},
        {"--top-k", [&] { o.top_k = number<int64_t>(name, value()); }},
        {"--top-p", [&] { o.top_p = number<double>(name, value()); }},
        {"--seed", [&] { o.seed = number<uint64_t>(name, value()); }},
        {"--gates", [&] { o.gates = value(); }},
        {"--threads", [&] { o.threads = number<int64_t>(name, value()); }},
        {"--verify", [&] { o.verify = true; }},
        {"--stats", [&] { o.stats = true; }},
        {"--logits", [&] { o.logits = value(); }},
        {"--encode", [&] { o.encode = true; }},
        {"--decode", [&] { o.decode = true; }},
        {"--help", [&] { o.help = true; }},
    };
    auto found = known.find(name);
    if (found == known.end()) throw BadRequest("unknown option '" + name + "'\n" + kUsage);
    found->second();
  }
  if (o.max_tokens < 1) throw BadRequest("--max-tokens must be >= 1");
  if (o.threads < 0 || o.threads > 4096) throw BadRequest("--threads must be from 0 to 4096");
  if (o.gates != "token" && o.gates != "off") throw BadRequest("--gates is token or off");
  if (o.has_prompt && o.has_ids) throw BadRequest("--prompt and --ids are one too many");
  if (o.model.empty()) {
    std::string self = carve::resolved("/proc/self/exe");
    o.model = self.substr(0, self.rfind('/') + 1);
  }
  return o;
}

std::vector<int64_t> id_list(const std::string& text) {
  std::vector<int64_t> ids;
  std::string part;
  for (char c : text + " ") {
    if (c != ' ' && c != ',' && c != '\n') {
      part += c;
    } else if (!part.empty()) {
      ids.push_back(number<int64_t>("a list of token ids", part));
      part.clear();
    }
  }
  return ids;
}

std::string standard_input() { return {std::istreambuf_iterator<char>(std::cin), {}}; }

void say(std::string_view text) {
  if (fwrite(text.data(), 1, text.size(), stdout) != text.size() || fflush(stdout) != 0)
    throw std::runtime_error("standard output cannot be written to");
}

std::string as_line(const std::vector<int64_t>& ids) {
  std::string line;
  for (int64_t id : ids) line += (line.empty() ? "" : " ") + std::to_string(id);
  return line + "\n";
}

void translate(const carve::Tokenizer& tokenizer, bool encode) {
  std::string all = standard_input(), part;
  char mark = encode ? '\0' : '\n';
  for (size_t at = 0; at < all.size();) {
    size_t end = std::min(all.find(mark, at), all.size());
    part = all.substr(at, end - at);
    at = end + 1;
    if (encode) {
      say(as_line(tokenizer.encode(part)));
      continue;
    }
    carve::Utf8Stream text;
    std::string out;
    for (int64_t id : id_list(part)) out += text.feed(tokenizer.bytes_of(id));
    say(out + text.flush() + '\0');
  }
}

void write_logits(carve::Model& model, const std::vector<int64_t>& ids, const Options& o) {
  carve::Session session(model, o.gates == "off");
  auto count = static_cast<int64_t>(ids.size());
  std::vector<float> logits = session.step(ids.data(), count, count);
  FILE* file = fopen(o.logits.c_str(), "wb");
  size_t written = file ? fwrite(logits.data(), sizeof(float), logits.size(), file) : 0;
  if (file == nullptr || fclose(file) != 0 || written != logits.size())
    throw BadRequest(o.logits + " cannot be written");
}

void generate(carve::Model& model, const carve::Tokenizer* tokenizer, const std::vector<int64_t>& ids,
              const Options& o) {
  const carve::Description& about = model.about;
  carve::Sampler sampler(o.temperature, o.top_k, o.top_p,
                         o.seed ? *o.seed : std::random_device{}() * (uint64_t{1} << 32) + std::random_device{}());
  carve::Session session(model, o.gates == "off");
  Clock::time_point began = Clock::now();
  // A prompt goes in parts of the same length as in carve_runtime.
  int64_t part = std::max<int64_t>(64, (int64_t{128} << 20) / (4 * about.vocab_size));
  auto count = static_cast<int64_t>(ids.size());
  if (count > about.max_length)
    throw BadRequest("the prompt has " + std::to_string(count) + " tokens, the model's context is " +
                     std::to_string(about.max_length));
  std::vector<float> logits;
  for (int64_t at = 0; at < count; at += part)
    logits = session.step(ids.data() + at, std::min(part, count - at), 1);
  int64_t token = sampler(logits.data(), logits.size());
  double first = seconds_since(began), since_start = seconds_since(kStart), decoding = 0;
  carve::Utf8Stream text;
  int64_t made = 0, steps = 0;
  const char* finish = "length";
  while (true) {
    if (std::find(about.ends.begin(), about.ends.end(), token) != about.ends.end()) {
      finish = "stop";
      break;
    }
    ++made;
    say(o.ids_out ? (made > 1 ? " " : "") + std::to_string(token) : text.feed(tokenizer->bytes_of(token)));
    if (made >= o.max_tokens || session.length() >= about.max_length) break;
    began = Clock::now();
    logits = session.step(&token, 1, 1);
    token = sampler(logits.data(), logits.size());
    decoding += seconds_since(began);
    ++steps;
  }
  say(text.flush() + "\n");
  if (o.stats)
    fprintf(stderr,
            "{\"prompt_tokens\": %" PRId64 ", \"tokens\": %" PRId64
            ", \"first_token_s\": %.4f, \"since_start_s\": %.4f, \"tokens_per_s\": %.2f, "
            "\"finish_reason\": \"%s\"}\n",
            count, made, first, since_start, decoding > 0 ? double(steps) / decoding : 0.0, finish);
}

int run(int argc, char** argv) {
  Options o = parse(argc, argv);
  if (o.help) {
    say(kUsage);
    return 0;
  }
  carve::Folder folder(o.model);
  const std::string compact = "tokenizer.carve";
  std::unique_ptr<carve::Tokenizer> tokenizer;
  bool wants_text = o.encode || o.decode || !o.has_ids || !o.ids_out;
  if (wants_text) {
    if (!folder.lists(compact))
      throw BadRequest("this program cannot do the model's tokenizer exactly: give --ids");
    tokenizer = std::make_unique<carve::Tokenizer>(folder.open(compact)->bytes());
  }
  if (o.encode || o.decode) {
    translate(*tokenizer, o.encode);
    return 0;
  }
  std::vector<int64_t> ids =
      o.has_ids ? id_list(o.ids) : tokenizer->encode(o.has_prompt ? o.prompt : standard_input());
  int threads = o.threads ? static_cast<int>(o.threads)
                          : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  // The pool starts as many workers as this says, and they spin for a while.
  setenv("TVM_NUM_THREADS", std::to_string(threads).c_str(), 1);
  carve::Model model(folder, threads, o.verify);
  if (ids.empty()) {
    if (!model.about.begin) throw BadRequest("the prompt has no tokens");
    ids.push_back(*model.about.begin);
  }
  if (o.logits.empty())
    generate(model, tokenizer.get(), ids, o);
  else
    write_logits(model, ids, o);
  return 0;
}

}  // namespace

int finish(int status, const char* why = nullptr) {
  if (why != nullptr) fprintf(stderr, "carve-run: %s\n", why);
  fflush(nullptr);
  // What ends a program in order would wait for workers that spin.
  std::_Exit(status);
}

int main(int argc, char** argv) {
  // Workers that are bound to cores wait for whatever else runs on them.
  setenv("TVM_BIND_THREADS", "0", 0);
  try {
    return finish(run(argc, argv));
  } catch (const BadRequest& e) {
    return finish(2, e.what());
  } catch (const std::bad_alloc&) {
    return finish(1, "there is too little memory");
  } catch (const std::exception& e) {
    return finish(1, e.what());
  }
}
