// UTF-8: the characters of a text, and text from bytes that come in pieces.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace carve {

struct Char {
  uint32_t code;
  int bytes;  // 0: these bytes are no character and cannot begin one; -1: one that is cut off
  int valid;  // of those, how many could have begun one (at least 1 where there is a byte)
};

// The character at the start of `text`, by the table of well-formed sequences (Unicode, 3.9).
inline Char first_char(std::string_view text) {
  auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  if (text.empty()) return {0, -1, 0};
  unsigned char a = byte(0);
  if (a < 0x80) return {a, 1, 1};
  int length = a >= 0xc2 && a <= 0xdf ? 2 : a >= 0xe0 && a <= 0xef ? 3 : a >= 0xf0 && a <= 0xf4 ? 4 : 0;
  if (length == 0) return {0, 0, 1};
  uint32_t code = a & (0xff >> (length + 1));
  for (int i = 1; i < length; ++i) {
    if (text.size() <= static_cast<size_t>(i)) return {0, -1, i};
    unsigned char c = byte(i);
    unsigned low = 0x80, high = 0xbf;
    if (i == 1) {
      if (a == 0xe0) low = 0xa0;
      if (a == 0xed) high = 0x9f;
      if (a == 0xf0) low = 0x90;
      if (a == 0xf4) high = 0x8f;
    }
    if (c < low || c > high) return {0, 0, i};
    code = code << 6 | (c & 0x3f);
  }
  return {code, length, length};
}

inline bool is_utf8(std::string_view text) {
  while (!text.empty()) {
    Char c = first_char(text);
    if (c.bytes <= 0) return false;
    text.remove_prefix(c.bytes);
  }
  return true;
}

inline void append_char(std::string& text, uint32_t code) {
  if (code < 0x80) {
    text += static_cast<char>(code);
  } else if (code < 0x800) {
    text += static_cast<char>(0xc0 | code >> 6);
    text += static_cast<char>(0x80 | (code & 0x3f));
  } else if (code < 0x10000) {
    text += static_cast<char>(0xe0 | code >> 12);
    text += static_cast<char>(0x80 | (code >> 6 & 0x3f));
    text += static_cast<char>(0x80 | (code & 0x3f));
  } else {
    text += static_cast<char>(0xf0 | code >> 18);
    text += static_cast<char>(0x80 | (code >> 12 & 0x3f));
    text += static_cast<char>(0x80 | (code >> 6 & 0x3f));
    text += static_cast<char>(0x80 | (code & 0x3f));
  }
}

// Bytes in, whole characters out; what is none reads as U+FFFD.
class Utf8Stream {
 public:
  std::string feed(std::string_view bytes) {
    held_ += bytes;
    return take(false);
  }
  std::string flush() { return take(true); }

 private:
  std::string take(bool last) {
    std::string out;
    std::string_view rest = held_;
    while (!rest.empty()) {
      Char c = first_char(rest);
      if (c.bytes < 0 && !last) break;
      if (c.bytes > 0)
        out += rest.substr(0, c.bytes);
      else
        append_char(out, 0xfffd);
      rest.remove_prefix(c.valid);
    }
    held_ = std::string(rest);
    return out;
  }
  std::string held_;
};

}  // namespace carve
