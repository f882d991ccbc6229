// Reads PTX text: directives, declarations and statements. Opcodes are read as words.
//
// Names declared in a nested { } scope get a suffix, so that a kernel has one flat set of names.
// Source: PTX ISA 9.0, sections 4 (syntax), 5 (state spaces) and 11 (directives).
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "lexer.h"
#include "program.h"

namespace deepkern::ptx {

std::string Statement::text() const {
  std::string result;
  for (const std::string& part : opcode) result += (result.empty() ? "" : ".") + part;
  return result;
}

bool Statement::has(const char* modifier) const {
  for (size_t i = 1; i < opcode.size(); i++)
    if (opcode[i] == modifier) return true;
  return false;
}

namespace {

class Parser : Lexer {
 public:
  explicit Parser(const std::string& text)
      : Lexer(text), module_(std::make_shared<Module>()) {
    module_->text = text;
  }

  std::shared_ptr<Module> run() {
    for (skip(); p_ < end_; skip()) directive();
    if (target_ == 0) fail("no .target");
    name_files();
    return module_;
  }

 private:
  int target_ = 0;
  std::shared_ptr<Module> module_;
  std::shared_ptr<Kernel> kernel_;  // while its body is read
  struct Located {
    std::shared_ptr<Kernel> kernel;
    size_t location;
    int file;
  };
  std::unordered_map<int, std::string> files_;
  std::vector<Located> located_;  // .file directives come behind the kernels

  void name_files() {
    for (auto& [kernel, index, file] : located_) {
      Location& l = kernel->locations[index];
      l.file = files_[file];
      if (l.text.empty())
        l.text = l.file.substr(l.file.rfind('/') + 1) + ":" + std::to_string(l.line);
    }
  }
  std::map<std::string, Variable> globals_;                           // variables of the module
  std::vector<std::unordered_map<std::string, std::string>> scopes_;  // name -> unique name
  int scopes_opened_ = 0;

  // Directives outside of kernels.
  void directive() {
    std::string name = word();
    if (name == ".version") {
      word(true);
    } else if (name == ".target") {
      read_target();
    } else if (name == ".address_size") {
      if (integer() != 64) fail("expected .address_size 64");
    } else if (name == ".file") {
      read_file();
    } else if (name == ".section") {
      word();
      skip_braces();
    } else if (name == ".entry") {
      read_kernel();
    } else if (name == ".visible" || name == ".extern" || name == ".weak" || name == ".common") {
      return;  // linkage of what follows
    } else if (name == ".shared" || name == ".global" || name == ".const") {
      Variable variable = read_variable(name.substr(1));
      globals_[variable.name] = variable;
      if (name != ".shared") module_->globals[variable.name] = variable.content;
    } else {
      fail("unknown directive " + name);
    }
  }

  void read_target() {
    std::string name = word();
    if (name.rfind("sm_", 0) != 0) fail("expected sm_N, got " + name);
    target_ = std::atoi(name.c_str() + 3);
    while (take(',')) word();
  }

  void read_file() {
    int index = static_cast<int>(integer());
    files_[index] = quoted();
    while (take(',')) integer();
  }

  static int bytes_of(const std::string& type) {
    if (type == ".pred") return 1;
    const char* digits = type.c_str() + type.find_first_of("0123456789");
    int bits = std::atoi(digits);
    return std::strchr(digits, 'x') ? bits / 4 : bits / 8;  // .f16x2 has 32 bits
  }

  // After `.shared`, `.global`, `.const` or `.local`.
  Variable read_variable(const std::string& space) {
    Variable variable;
    variable.space = space;
    int element = 1;
    std::string part = word();
    for (; part[0] == '.'; part = word()) {
      if (part == ".align")
        variable.align = static_cast<int>(integer());
      else
        element = bytes_of(part);
    }
    variable.name = part;
    int64_t count = 1;
    while (take('[')) {
      count *= at(']') ? 0 : integer();
      expect(']');
    }
    variable.bytes = element * count;
    variable.content.assign(variable.bytes, 0);
    if (take('=')) read_initializer(variable, element);
    expect(';');
    return variable;
  }

  void read_initializer(Variable& variable, int element) {
    bool list = take('{');
    int64_t at_byte = 0;
    do {
      uint64_t bits = read_number().bits;
      if (at_byte + element > variable.bytes) fail("too many values for " + variable.name);
      std::memcpy(variable.content.data() + at_byte, &bits, element);
      at_byte += element;
    } while (list && take(','));
    if (list) expect('}');
  }

  void read_kernel() {
    kernel_ = std::make_shared<Kernel>();
    kernel_->target = target_;
    kernel_->name = word();
    for (const auto& [name, variable] : globals_) kernel_->variables[name] = variable;
    if (take('(')) {
      while (!take(')')) {
        read_parameter();
        take(',');
      }
    }
    while (!at('{')) read_performance_directive();
    p_++;
    scopes_.assign(1, {});
    while (!scopes_.empty()) body();
    module_->kernels[kernel_->name] = kernel_;
    kernel_.reset();
  }

  void read_parameter() {
    if (word() != ".param") fail("expected .param");
    Parameter parameter;
    std::string part = word();
    bool pointer = false;
    for (; part[0] == '.'; part = word()) {
      if (part == ".align") {
        int align = static_cast<int>(integer());
        if (!pointer) parameter.align = align;  // behind .ptr it is that of the pointee
      } else if (part == ".ptr") {
        pointer = true;
      } else if (part != ".global" && part != ".shared" && part != ".const" && part != ".local") {
        parameter.bytes = bytes_of(part);
      }
    }
    parameter.name = part;
    int element = parameter.bytes;
    if (parameter.align == 1) parameter.align = element;
    if (take('[')) {
      parameter.bytes = element * static_cast<int>(integer());
      expect(']');
    }
    int align = parameter.align;
    parameter.offset = (kernel_->parameter_bytes + align - 1) / align * align;
    kernel_->parameter_bytes = parameter.offset + parameter.bytes;
    kernel_->parameters.push_back(parameter);
  }

  void read_performance_directive() {
    std::string name = word();
    int* sizes = name == ".reqntid"             ? kernel_->required_threads
                 : name == ".reqnctapercluster" ? kernel_->cluster
                                                : nullptr;
    if (sizes) {
      sizes[0] = sizes[1] = sizes[2] = 1;
      for (int i = 0; i == 0 || (i < 3 && take(',')); i++) sizes[i] = static_cast<int>(integer());
    } else if (name == ".maxntid") {
      kernel_->max_threads = static_cast<int>(integer());
      while (take(',')) kernel_->max_threads *= static_cast<int>(integer());
    } else if (name == ".maxnreg") {
      kernel_->max_registers = static_cast<int>(integer());
    } else if (name == ".minnctapersm" || name == ".maxclusterrank") {
      integer();
    } else if (name != ".explicitcluster" && name != ".noreturn") {
      fail("unknown directive " + name);
    }
  }

  // One item of a kernel's body.
  void body() {
    skip();
    if (p_ >= end_) fail("kernel " + kernel_->name + " has no end");
    if (take('{')) {
      scopes_.emplace_back();
      scopes_opened_++;
    } else if (take('}')) {
      scopes_.pop_back();
    } else if (*p_ == '.') {
      declaration();
    } else if (take(';')) {
      return;
    } else if (*p_ == '@' || *p_ == '_' || *p_ == '$' ||
               std::isalpha(static_cast<unsigned char>(*p_))) {
      if (!label()) statement();
    } else {
      fail(std::string("unexpected '") + *p_ + "'");
    }
  }

  void declaration() {
    std::string name = word();
    if (name == ".reg") {
      read_registers();
    } else if (name == ".loc") {
      read_location();
    } else if (name == ".pragma") {
      quoted();
      expect(';');
    } else if (name == ".shared" || name == ".local") {
      Variable variable = read_variable(name.substr(1));
      variable.name = declare(variable.name);
      kernel_->variables[variable.name] = variable;
    } else {
      fail("unknown directive " + name);
    }
  }

  // The unique name of a name declared in the innermost scope.
  std::string declare(const std::string& name) {
    if (scopes_.size() == 1) return name;
    return scopes_.back()[name] = name + "@" + std::to_string(scopes_opened_);
  }

  std::string resolve(const std::string& name) const {
    for (size_t i = scopes_.size(); i-- > 1;) {
      auto found = scopes_[i].find(name);
      if (found != scopes_[i].end()) return found->second;
    }
    return name;
  }

  void read_registers() {
    std::string type = word();
    int bits = type == ".pred" ? 1 : bytes_of(type) * 8;
    do {
      std::string name = word();
      if (take('<')) {
        int64_t count = integer();
        expect('>');
        for (int64_t i = 0; i < count; i++)
          kernel_->widths[declare(name + std::to_string(i))] = bits;
      } else {
        kernel_->widths[declare(name)] = bits;
      }
    } while (take(','));
    expect(';');
  }

  // LLVM writes the chain of inlined calls into the comment behind a .loc: it is the best text.
  void read_location() {
    Location location;
    int file = static_cast<int>(integer());
    location.line = static_cast<int>(integer());
    integer();
    while (p_ < end_ && *p_ != '\n' && !(p_[0] == '/' && p_[1] == '/')) p_++;
    if (p_ < end_ && *p_ == '/') {
      const char* begin = p_ + 2;
      skip_line();
      while (begin < p_ && *begin == ' ') begin++;
      location.text.assign(begin, p_);
    }
    located_.push_back({kernel_, kernel_->locations.size(), file});
    kernel_->locations.push_back(location);
  }

  bool label() {
    const char* p = p_;
    while (p < end_ && is_name(*p)) p++;
    if (p == p_ || p >= end_ || *p != ':' || (p + 1 < end_ && p[1] == ':')) return false;
    std::string name(p_, p);
    p_ = p + 1;
    kernel_->labels[declare_label(name)] = static_cast<int>(kernel_->statements.size());
    return true;
  }

  // A label may be used before its declaration: labels of scopes are resolved by the same rule.
  std::string declare_label(const std::string& name) {
    if (scopes_.size() == 1) return name;
    auto found = scopes_.back().find(name);
    return found != scopes_.back().end() ? found->second : declare(name);
  }

  void statement() {
    Statement s;
    s.line = line_;
    s.location = static_cast<int>(kernel_->locations.size()) - 1;
    if (take('@')) {
      s.guard_negated = take('!');
      s.guard = resolve(word());
    }
    std::string opcode = word(true);
    for (size_t begin = 0; begin <= opcode.size();) {
      size_t dot = std::min(opcode.find('.', begin), opcode.size());
      s.opcode.push_back(opcode.substr(begin, dot - begin));
      begin = dot + 1;
    }
    if (!at(';')) {
      do s.operands.push_back(read_operand());
      while (take(','));
    }
    expect(';');
    if (s.opcode[0] == "bra" && s.operands.size() == 1) name_target(s.operands[0]);
    kernel_->statements.push_back(std::move(s));
  }

  // A forward branch inside a scope may name a label of that scope or of an outer one. PTX of
  // compilers declares a scope's labels once, so a label without a known name belongs to the scope
  // if the text before the closing brace declares it.
  void name_target(OperandText& target) {
    if (scopes_.size() == 1 || resolve(target.name) != target.name) {
      target.name = resolve(target.name);
      return;
    }
    int depth = 0;
    for (const char* p = p_; p < end_ && depth >= 0; p++) {
      depth += *p == '{' ? 1 : *p == '}' ? -1 : 0;
      size_t n = target.name.size();
      bool here = depth == 0 && p + n < end_ && !target.name.compare(0, n, p, n) && p[n] == ':';
      if (here && !is_name(p[-1])) {
        target.name = declare(target.name);
        return;
      }
    }
  }

  OperandText read_operand() {
    OperandText operand = read_simple();
    bool pair_begins = operand.kind == OperandText::REGISTER || operand.kind == OperandText::SINK;
    if (pair_begins && take('|')) {
      OperandText pair;
      pair.kind = OperandText::PAIR;
      pair.parts = {operand, read_simple()};
      return pair;
    }
    return operand;
  }

  OperandText read_simple() {
    OperandText operand;
    if (take('{')) {
      operand.kind = OperandText::LIST;
      do operand.parts.push_back(read_simple());
      while (take(','));
      expect('}');
    } else if (take('[')) {
      operand = read_address();
    } else if (take('!')) {
      operand = read_simple();
      operand.negated = true;
    } else if (at('-') || std::isdigit(static_cast<unsigned char>(*p_))) {
      operand = read_number();
    } else {
      operand = read_name();
    }
    return operand;
  }

  OperandText read_address() {
    OperandText operand;
    OperandText base = read_simple();
    operand.kind = OperandText::ADDRESS;
    operand.name = base.name;
    operand.bits = base.bits;
    if (base.kind == OperandText::LIST) fail("expected an address");
    if (take('+'))
      operand.bits += integer();
    else if (at('-'))
      operand.bits += integer();
    while (take(',')) operand.parts.push_back(read_simple());
    expect(']');
    return operand;
  }

  OperandText read_number() {
    OperandText operand;
    operand.kind = OperandText::IMMEDIATE;
    skip();
    bool negative = *p_ == '-';
    const char* digits = p_ + negative;
    if (digits + 1 < end_ && digits[0] == '0' && std::strchr("fFdD", digits[1])) {
      operand.float_bits = std::tolower(digits[1]) == 'f' ? 32 : 64;
      std::string hex(digits + 2, operand.float_bits / 4);
      operand.bits = std::strtoull(hex.c_str(), nullptr, 16);
      if (negative) operand.bits ^= uint64_t(1) << (operand.float_bits - 1);
      p_ = digits + 2 + operand.float_bits / 4;
      return operand;
    }
    operand.bits = static_cast<uint64_t>(integer());
    if (p_ < end_ && (*p_ == '.' || *p_ == 'e')) fail("decimal floating-point numbers");
    return operand;
  }

  OperandText read_name() {
    OperandText operand;
    std::string name = word();
    if (name == "_") return operand;
    if (name[0] == '%' && p_ < end_ && *p_ == '.') name += word();  // %tid.x
    operand.name = resolve(name);
    bool is_register = name[0] == '%' || kernel_->widths.count(operand.name);
    operand.kind = is_register ? OperandText::REGISTER : OperandText::SYMBOL;
    if (!is_register && at('+')) {
      p_++;
      operand.bits = static_cast<uint64_t>(integer());
    }
    return operand;
  }
};

}  // namespace

std::shared_ptr<Module> read_module(const std::string& text) { return Parser(text).run(); }

}  // namespace deepkern::ptx
