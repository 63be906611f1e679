// JSON without what parsers disagree on: no key twice, no deeper than 64, whole numbers that fit.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "files.h"
#include "utf8.h"

namespace carve {

struct Json {
  enum class Kind { null, boolean, whole, real, text, list, object };
  Kind kind = Kind::null;
  bool truth = false;
  int64_t number = 0;
  double value = 0;
  std::string string;
  std::vector<std::string> keys;  // of an object, beside `items`
  std::vector<Json> items;

  const Json* find(std::string_view key) const {
    for (size_t i = 0; i < keys.size(); ++i)
      if (keys[i] == key) return &items[i];
    return nullptr;
  }
  const Json& at(std::string_view key, Kind due) const {
    const Json* found = find(key);
    if (found == nullptr || found->kind != due)
      throw BadModel("the model's records: '" + std::string(key) + "' is missing or of another type");
    return *found;
  }
  const std::string& text_at(std::string_view key) const { return at(key, Kind::text).string; }
  const Json& object_at(std::string_view key) const { return at(key, Kind::object); }
  const std::vector<Json>& list_at(std::string_view key) const { return at(key, Kind::list).items; }
  int64_t count_at(std::string_view key, int64_t low, int64_t high) const {
    int64_t found = at(key, Kind::whole).number;
    if (found < low || found > high)
      throw BadModel("the model's records: '" + std::string(key) + "' is out of range");
    return found;
  }
};

class JsonParser {
 public:
  // `what` names the text in errors.
  JsonParser(std::string_view text, std::string what) : text_(text), what_(std::move(what)) {}

  Json parse() {
    if (text_.size() > (size_t{64} << 20)) fail("is too large");
    if (!is_utf8(text_)) fail("is not UTF-8");
    Json found = value(0);
    space();
    if (at_ != text_.size()) fail("goes on after its end");
    return found;
  }

 private:
  [[noreturn]] void fail(const char* why) const {
    throw BadModel(what_ + " " + why + " (JSON, byte " + std::to_string(at_) + ")");
  }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void space() {
    while (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r') ++at_;
  }
  bool take(char c) {
    space();
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  void due(char c) {
    if (!take(c)) fail("is malformed");
  }
  bool word(std::string_view w) {
    if (text_.substr(at_, w.size()) != w) return false;
    at_ += w.size();
    return true;
  }

  Json value(int depth) {
    if (depth > 64) fail("nests too deep");
    space();
    Json found;
    if (peek() == '{') {
      found.kind = Json::Kind::object;
      ++at_;
      if (!take('}')) {
        do {
          space();
          found.keys.push_back(text());
          due(':');
          found.items.push_back(value(depth + 1));
        } while (take(','));
        due('}');
      }
      std::vector<std::string> sorted = found.keys;
      std::sort(sorted.begin(), sorted.end());
      if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) fail("has a key twice");
    } else if (peek() == '[') {
      found.kind = Json::Kind::list;
      ++at_;
      if (!take(']')) {
        do found.items.push_back(value(depth + 1));
        while (take(','));
        due(']');
      }
    } else if (peek() == '"') {
      found.kind = Json::Kind::text;
      found.string = text();
    } else if (word("true") || word("false")) {
      found.kind = Json::Kind::boolean;
      found.truth = text_[at_ - 2] == 'u';
    } else if (!word("null")) {
      number(found);
    }
    return found;
  }

  void number(Json& found) {
    size_t start = at_;
    auto digits = [&] {
      size_t from = at_;
      while (peek() >= '0' && peek() <= '9') ++at_;
      return at_ - from;
    };
    if (peek() == '-') ++at_;
    bool zero = peek() == '0';
    size_t count = digits();
    if (count == 0 || (zero && count > 1)) fail("is malformed");
    bool whole = true;
    if (peek() == '.') {
      ++at_;
      whole = false;
      if (digits() == 0) fail("is malformed");
    }
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      whole = false;
      if (peek() == '+' || peek() == '-') ++at_;
      if (digits() == 0) fail("is malformed");
    }
    const char *from = text_.data() + start, *to = text_.data() + at_;
    found.kind = whole ? Json::Kind::whole : Json::Kind::real;
    std::errc bad = whole ? std::from_chars(from, to, found.number).ec
                          : std::from_chars(from, to, found.value).ec;
    if (bad != std::errc()) fail("holds a number that is out of range");
  }

  std::string text() {
    if (peek() != '"') fail("is malformed");
    ++at_;
    std::string out;
    while (true) {
      if (at_ >= text_.size() || static_cast<unsigned char>(text_[at_]) < 32) fail("is malformed");
      char c = text_[at_++];
      if (c == '"') return out;
      if (c != '\\') {
        out += c;
        continue;
      }
      char e = peek();
      ++at_;
      static constexpr std::string_view from = "\"\\/bfnrt", to = "\"\\/\b\f\n\r\t";
      size_t plain = e == '\0' ? std::string_view::npos : from.find(e);
      if (plain != std::string_view::npos) {
        out += to[plain];
      } else if (e == 'u') {
        uint32_t code = hex();
        if (code >= 0xd800 && code < 0xdc00) {
          if (!word("\\u")) fail("holds half a character");
          uint32_t low = hex();
          if (low < 0xdc00 || low > 0xdfff) fail("holds half a character");
          code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
        } else if (code >= 0xdc00 && code < 0xe000) {
          fail("holds half a character");
        }
        append_char(out, code);
      } else {
        fail("is malformed");
      }
    }
  }

  uint32_t hex() {
    uint32_t code = 0;
    std::string_view four = text_.substr(at_, 4);
    auto [end, bad] = std::from_chars(four.data(), four.data() + four.size(), code, 16);
    if (bad != std::errc() || four.size() != 4 || end != four.data() + 4 || four[0] == '-')
      fail("is malformed");
    at_ += 4;
    return code;
  }

  std::string_view text_;
  std::string what_;
  size_t at_ = 0;
};

inline Json parse_json(std::string_view text, const std::string& what) {
  return JsonParser(text, what).parse();
}

}  // namespace carve
