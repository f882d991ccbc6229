// Words, numbers and punctuation of PTX text.
// Source: PTX ISA 9.0, section 4 (syntax).
#pragma once

#include <cctype>
#include <cstdlib>
#include <string>

#include "program.h"

namespace deepkern::ptx {

inline bool is_name(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$'; }

class Lexer {
 protected:
  explicit Lexer(const std::string& text) : p_(text.data()), end_(text.data() + text.size()) {}

  const char* p_;
  const char* end_;
  int line_ = 1;

  [[noreturn]] void fail(const std::string& message) const {
    throw InvalidProgram("PTX line " + std::to_string(line_) + ": " + message);
  }

  // Skips blanks and comments.
  void skip() {
    while (p_ < end_) {
      if (*p_ == '\n')
        line_++, p_++;
      else if (std::isspace(static_cast<unsigned char>(*p_)))
        p_++;
      else if (p_ + 1 < end_ && p_[0] == '/' && p_[1] == '/')
        skip_line();
      else if (p_ + 1 < end_ && p_[0] == '/' && p_[1] == '*')
        skip_comment();
      else
        break;
    }
  }

  void skip_line() {
    while (p_ < end_ && *p_ != '\n') p_++;
  }

  void skip_comment() {
    for (p_ += 2; p_ + 1 < end_ && !(p_[0] == '*' && p_[1] == '/'); p_++)
      if (*p_ == '\n') line_++;
    p_ += 2;
  }

  bool at(char c) {
    skip();
    return p_ < end_ && *p_ == c;
  }

  bool take(char c) {
    if (!at(c)) return false;
    p_++;
    return true;
  }

  void expect(char c) {
    if (!take(c))
      fail(std::string("expected '") + c + "', got '" + (p_ < end_ ? std::string(1, *p_) : "end") +
           "'");
  }

  // A run of characters of names; dots and colons too if `dotted`.
  std::string word(bool dotted = false) {
    skip();
    const char* begin = p_;
    if (p_ < end_ && (*p_ == '%' || *p_ == '.')) p_++;
    while (p_ < end_ && (is_name(*p_) || (dotted && (*p_ == '.' || *p_ == ':')))) p_++;
    if (p_ == begin) fail(std::string("expected a name, got '") + (p_ < end_ ? *p_ : ' ') + "'");
    return std::string(begin, p_);
  }

  int64_t integer() {
    skip();
    bool negative = p_ < end_ && *p_ == '-';
    if (negative) p_++;
    char* after = nullptr;
    uint64_t value = std::strtoull(p_, &after, 0);
    if (after == p_) fail("expected an integer");
    p_ = after;
    while (p_ < end_ && (*p_ == 'U' || *p_ == 'u' || *p_ == 'L')) p_++;
    return negative ? -static_cast<int64_t>(value) : static_cast<int64_t>(value);
  }

  std::string quoted() {
    expect('"');
    const char* begin = p_;
    while (p_ < end_ && *p_ != '"') p_++;
    std::string result(begin, p_);
    expect('"');
    return result;
  }

  void skip_braces() {
    expect('{');
    for (int depth = 1; depth > 0 && p_ < end_; p_++) {
      if (*p_ == '\n') line_++;
      depth += *p_ == '{' ? 1 : *p_ == '}' ? -1 : 0;
    }
  }
};

}  // namespace deepkern::ptx
