// Byte-level BPE, from the file that carve.native_tokenizer writes.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <queue>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "files.h"
#include "utf8.h"

namespace carve {

// Little-endian fields, every length checked against what is there.
class Fields {
 public:
  explicit Fields(std::string_view data) : data_(data) {}

  std::string_view bytes(size_t count) {
    if (count > data_.size()) throw BadModel("the tokenizer's file is cut off");
    std::string_view found = data_.substr(0, count);
    data_.remove_prefix(count);
    return found;
  }
  uint32_t word() {
    std::string_view four = bytes(4);
    uint32_t value = 0;
    for (int i = 3; i >= 0; --i) value = value << 8 | static_cast<unsigned char>(four[i]);
    return value;
  }
  // How many items of at least `size` bytes follow.
  uint32_t count(size_t size) {
    uint32_t found = word();
    if (found > data_.size() / size) throw BadModel("the tokenizer's file is cut off");
    return found;
  }
  bool ended() const { return data_.empty(); }

 private:
  std::string_view data_;
};

class Tokenizer {
 public:
  explicit Tokenizer(std::string_view data) {
    Fields in(data);
    if (in.bytes(8) != std::string_view("carvetok") || in.word() != 1)
      throw BadModel("the tokenizer's file is not of this version");
    flags_ = in.word();
    longest_number_ = in.word();
    for (auto& ranges : classes_) {
      ranges.resize(in.count(8));
      for (auto& range : ranges) range = {in.word(), in.word()};
    }
    tokens_.resize(in.count(8));
    std::vector<uint32_t> words;
    for (uint32_t id = 0; id < tokens_.size(); ++id) {
      uint32_t kind = in.word();
      std::string_view text = in.bytes(in.word());
      if (!(kind & kSpecial)) tokens_[id] = text;
      if (kind & kWord) words.push_back(id);
    }
    for (auto& id : letters_) id = known(in.word());
    if (flags_ & kWholeWords)
      for (uint32_t id : words) words_.emplace(tokens_[id], id);
    uint32_t merges = in.count(12);
    merges_.reserve(merges);
    for (uint32_t rank = 0; rank < merges; ++rank) {
      uint32_t left = known(in.word()), right = known(in.word()), made = known(in.word());
      merges_.emplace(pair(left, right), Merge{rank, made});
    }
    for (auto& group : added_) {
      uint32_t count = in.count(8);
      for (uint32_t i = 0; i < count; ++i) {
        uint32_t id = known(in.word());
        std::string_view text = in.bytes(in.word());
        if (text.empty()) throw BadModel("the tokenizer's file has a token without text");
        group[static_cast<unsigned char>(text[0])].emplace_back(text, id);
      }
      for (auto& found : group)
        std::sort(found.begin(), found.end(),
                  [](auto& a, auto& b) { return a.first.size() > b.first.size(); });
    }
    for (auto* ids : {&before_, &after_}) {
      ids->resize(in.count(4));
      for (auto& id : *ids) id = known(in.word());
    }
    if (!in.ended()) throw BadModel("the tokenizer's file goes on after its end");
  }

  // With the special tokens that the tokenizer puts around a text.
  std::vector<int64_t> encode(std::string_view text) const {
    if (!is_utf8(text)) throw BadRequest("the text is not UTF-8");
    std::vector<int64_t> ids(before_.begin(), before_.end());
    split_added(text, 0, ids);
    ids.insert(ids.end(), after_.begin(), after_.end());
    return ids;
  }

  // What a token adds to the text, in bytes; nothing where it is special or unknown.
  std::string_view bytes_of(int64_t id) const {
    if (id < 0 || static_cast<size_t>(id) >= tokens_.size()) return {};
    return tokens_[static_cast<size_t>(id)];
  }

 private:
  static constexpr uint32_t kSpecial = 1, kWord = 2;                       // of a token
  static constexpr uint32_t kPrefixSpace = 1, kWholeWords = 2, kSingleDigits = 4, kLlama = 8;
  enum Class { letter, number, space, digit };
  struct Merge {
    uint32_t rank, made;
  };
  using Added = std::array<std::vector<std::pair<std::string, uint32_t>>, 256>;

  uint32_t known(uint32_t id) const {
    if (id >= tokens_.size()) throw BadModel("the tokenizer's file names a token that is not there");
    return id;
  }
  static uint64_t pair(uint32_t left, uint32_t right) { return uint64_t(left) << 32 | right; }

  bool is(Class what, uint32_t code) const {
    const auto& ranges = classes_[what];
    auto after = std::upper_bound(ranges.begin(), ranges.end(), code,
                                  [](uint32_t c, auto& range) { return c < range.first; });
    return after != ranges.begin() && code <= std::prev(after)->second;
  }

  // Added tokens are cut out first: those that stand for the raw text, then the others; of several
  // at one place the longest.
  void split_added(std::string_view text, size_t group, std::vector<int64_t>& ids) const {
    if (group == added_.size()) {
      if (!text.empty()) split_digits(text, ids);
      return;
    }
    size_t start = 0;
    for (size_t at = 0; at < text.size();) {
      const std::pair<std::string, uint32_t>* found = nullptr;
      for (const auto& item : added_[group][static_cast<unsigned char>(text[at])]) {
        if (text.compare(at, item.first.size(), item.first) == 0) {
          found = &item;
          break;
        }
      }
      if (found == nullptr) {
        ++at;
        continue;
      }
      split_added(text.substr(start, at - start), group + 1, ids);
      ids.push_back(found->second);
      start = at += found->first.size();
    }
    split_added(text.substr(start), group + 1, ids);
  }

  void split_digits(std::string_view text, std::vector<int64_t>& ids) const {
    if (!(flags_ & kSingleDigits)) return split_words(text, ids);
    size_t start = 0;
    for (size_t at = 0; at < text.size();) {
      Char c = first_char(text.substr(at));
      if (is(digit, c.code)) {
        if (start < at) split_words(text.substr(start, at - start), ids);
        split_words(text.substr(at, c.bytes), ids);
        start = at + c.bytes;
      }
      at += c.bytes;
    }
    if (start < text.size()) split_words(text.substr(start), ids);
  }

  void split_words(std::string_view piece, std::vector<int64_t>& ids) const {
    std::string padded;
    if ((flags_ & kPrefixSpace) && piece[0] != ' ') piece = padded = " " + std::string(piece);
    std::vector<uint32_t> codes;
    std::vector<size_t> starts;
    for (size_t at = 0; at < piece.size();) {
      Char c = first_char(piece.substr(at));
      codes.push_back(c.code);
      starts.push_back(at);
      at += c.bytes;
    }
    starts.push_back(piece.size());
    std::vector<char> kinds(codes.size());
    for (size_t i = 0; i < codes.size(); ++i)
      kinds[i] = is(letter, codes[i]) ? 'L' : is(number, codes[i]) ? 'N' : is(space, codes[i]) ? 's' : 'o';
    for (size_t at = 0; at < codes.size();) {
      size_t end = (flags_ & kLlama) ? llama_word(codes, kinds, at) : gpt2_word(codes, kinds, at);
      merge(piece.substr(starts[at], starts[end] - starts[at]), ids);
      at = end;
    }
  }

  using Codes = std::vector<uint32_t>;
  using Kinds = std::vector<char>;

  static size_t run(const Kinds& kinds, size_t at, char kind, size_t most = SIZE_MAX) {
    size_t end = at;
    while (end < kinds.size() && kinds[end] == kind && end - at < most) ++end;
    return end;
  }

  // 's, 't, 're, 've, 'm, 'll, 'd; in any case where `fold`. The end, or `at` where there is none.
  static size_t contraction(const Codes& codes, size_t at, bool fold) {
    auto letter = [&](size_t i) -> uint32_t {
      if (i >= codes.size()) return 0;
      uint32_t c = codes[i];
      if (fold && c == 0x17f) return 's';
      return fold && c >= 'A' && c <= 'Z' ? c + 32 : c;
    };
    if (codes[at] != '\'') return at;
    uint32_t a = letter(at + 1), b = letter(at + 2);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return at + 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return at + 3;
    return at;
  }

  // \s+(?!\S)|\s+
  static size_t spaces(const Kinds& kinds, size_t at) {
    size_t end = run(kinds, at, 's');
    return end < kinds.size() && end - at > 1 ? end - 1 : end;
  }

  // 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
  static size_t gpt2_word(const Codes& codes, const Kinds& kinds, size_t at) {
    if (size_t end = contraction(codes, at, false); end > at) return end;
    size_t from = codes[at] == ' ' && at + 1 < codes.size() && kinds[at + 1] != 's' ? at + 1 : at;
    return kinds[from] != 's' ? run(kinds, from, kinds[from]) : spaces(kinds, at);
  }

  // (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,n}| ?[^\s\p{L}\p{N}]+[\r\n]*
  // |\s*[\r\n]+|\s+(?!\S)|\s+
  size_t llama_word(const Codes& codes, const Kinds& kinds, size_t at) const {
    if (size_t end = contraction(codes, at, true); end > at) return end;
    auto line = [&](size_t i) { return codes[i] == '\r' || codes[i] == '\n'; };
    auto kind = [&](size_t i) { return i < kinds.size() ? kinds[i] : '\0'; };
    if (kind(at) == 'L') return run(kinds, at, 'L');
    if (kind(at) != 'N' && !line(at) && kind(at + 1) == 'L') return run(kinds, at + 1, 'L');
    if (kind(at) == 'N') return run(kinds, at, 'N', longest_number_);
    size_t from = codes[at] == ' ' && kind(at + 1) == 'o' ? at + 1 : at;
    if (kind(from) == 'o') {
      size_t end = run(kinds, from, 'o');
      while (end < codes.size() && line(end)) ++end;
      return end;
    }
    for (size_t end = run(kinds, at, 's'); end > at; --end)
      if (line(end - 1)) return end;
    return spaces(kinds, at);
  }

  // The pair of the lowest rank first, the leftmost of several, until none is left.
  void merge(std::string_view word, std::vector<int64_t>& ids) const {
    if (flags_ & kWholeWords) {
      if (auto whole = words_.find(std::string(word)); whole != words_.end()) {
        ids.push_back(whole->second);
        return;
      }
    }
    struct Symbol {
      uint32_t id;
      size_t before, next;
      bool gone;
    };
    struct Step {
      uint32_t rank, made;
      size_t at;
      bool operator<(const Step& o) const { return rank != o.rank ? rank > o.rank : at > o.at; }
    };
    const size_t none = word.size();
    std::vector<Symbol> symbols(word.size());
    for (size_t i = 0; i < word.size(); ++i)
      symbols[i] = {letters_[static_cast<unsigned char>(word[i])], i ? i - 1 : none, i + 1, false};
    std::priority_queue<Step> steps;
    auto offer = [&](size_t at) {
      if (at == none || symbols[at].next == none) return;
      auto found = merges_.find(pair(symbols[at].id, symbols[symbols[at].next].id));
      if (found != merges_.end()) steps.push({found->second.rank, found->second.made, at});
    };
    for (size_t i = 0; i < word.size(); ++i) offer(i);
    while (!steps.empty()) {
      Step step = steps.top();
      steps.pop();
      Symbol& left = symbols[step.at];
      if (left.gone || left.next == none) continue;
      Symbol& right = symbols[left.next];
      auto found = merges_.find(pair(left.id, right.id));
      if (found == merges_.end() || found->second.made != step.made) continue;
      left.id = step.made;
      right.gone = true;
      left.next = right.next;
      if (left.next != none) symbols[left.next].before = step.at;
      offer(left.before);
      offer(step.at);
    }
    for (size_t at = 0; at < none; at = symbols[at].next) ids.push_back(symbols[at].id);
  }

  uint32_t flags_ = 0, longest_number_ = 0;
  std::array<std::vector<std::pair<uint32_t, uint32_t>>, 4> classes_;
  std::vector<std::string> tokens_;
  std::array<uint32_t, 256> letters_{};
  std::unordered_map<std::string, uint32_t> words_;
  std::unordered_map<uint64_t, Merge> merges_;
  std::array<Added, 2> added_;
  std::vector<uint32_t> before_, after_;
};

}  // namespace carve
