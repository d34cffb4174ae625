#include "engine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <utility>
#include <vector>

#include "cuda_fp16.h"
#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// -------------------------------------------------------------------------------- stacks of fibers
#if defined(__x86_64__)
// Keeps what a call must keep on this stack and goes on where the other one left off.
extern "C" void lexico_emulated_switch(void** save, void* load);
__asm__(
    ".text\n.globl lexico_emulated_switch\n.type lexico_emulated_switch,@function\n"
    "lexico_emulated_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n  ret\n"
    ".size lexico_emulated_switch,.-lexico_emulated_switch\n");
#else
#include <ucontext.h>
#endif

namespace emulated {
namespace {

constexpr std::size_t kStackBytes = 256 << 10;
constexpr std::size_t kMargin = 4096;  // around the block's shared memory
constexpr unsigned char kMarginByte = 0xa5;

class Stack {
 public:
  Stack() {
    memory_ = static_cast<char*>(mmap(nullptr,
                                      kStackBytes,
                                      PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                                      -1,
                                      0));
    if (memory_ == MAP_FAILED) std::abort();
  }
  ~Stack() { munmap(memory_, kStackBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  char* bottom() const { return memory_; }

 private:
  char* memory_;
};

struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* fake_stack = nullptr;  // of the address sanitizer
};

struct Copy {
  void* to;
  const void* from;
  bool valid;
  int group;
};

enum class State { kReady, kWaits, kDone };

struct Fiber {
  Context context;
  std::unique_ptr<Stack> stack = std::make_unique<Stack>();
  State state = State::kDone;
  uint3 index{};
  int lane = 0, warp = 0;
  // What it waits for.
  const char* what = "";
  Where where;
  int barrier_sum = 0;
  std::vector<Copy> copies;
  int group = 0;  // of copies, the one that is open
};

// Lanes that wait for each other; mask 0: none do.
struct Meeting {
  unsigned mask, arrived;
  const char* name;
  Where where;
  void* data[32];
};

struct Warp {
  unsigned lanes = 0;  // that are there
  Meeting meetings[8] = {};
};

struct Engine {
  Device device;
  std::string fault;
  std::int64_t launches = 0;
  std::function<void()> next;

  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  int num_threads = 0;
  int at_barrier = 0, barrier_sum = 0;
  Where barrier;
  Fiber* current = nullptr;
  Context scheduler;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
  const std::function<void()>* call = nullptr;
  std::vector<unsigned char> shared;
  unsigned char* shared_begin = nullptr;
  std::size_t shared_bytes = 0;
  bool failed = false;
};

Engine& engine() {
  static Engine one;
  return one;
}

std::string place(const Fiber& f, const Where& where) {
  std::ostringstream out;
  const std::string file = where.file_name();
  out << "thread (" << f.index.x << ", " << f.index.y << ", " << f.index.z << ") of block ("
      << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << ") at "
      << file.substr(file.rfind('/') + 1) << ":" << where.line();
  return out.str();
}

bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

void switch_to(Context& from, Context& to, const void* stack, std::size_t bytes, bool ends) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, stack, bytes);
#else
  (void)stack, (void)bytes, (void)ends;
#endif
#if defined(__x86_64__)
  lexico_emulated_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void leave(bool ends) {
  Engine& e = engine();
  switch_to(e.current->context, e.scheduler, e.scheduler_stack, e.scheduler_stack_bytes, ends);
}

// First function of every fiber.
void thread_main() {
  Engine& e = engine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &e.scheduler_stack, &e.scheduler_stack_bytes);
#endif
  (*e.call)();
  e.current->state = State::kDone;
  leave(true);
  std::abort();  // nobody resumes it
}

void start(Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  // A kernel that failed left its frames behind.
  __asan_unpoison_memory_region(f.stack->bottom(), kStackBytes);
#endif
#if defined(__x86_64__)
  // As lexico_emulated_switch leaves a stack: six registers, then where to return to. At its first
  // instruction a function has a stack that is 8 off a multiple of 16.
  void** top = reinterpret_cast<void**>(f.stack->bottom() + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  f.context.stack_pointer = top;
#else
  getcontext(&f.context.context);
  f.context.context.uc_stack.ss_sp = f.stack->bottom();
  f.context.context.uc_stack.ss_size = kStackBytes;
  f.context.context.uc_link = nullptr;
  makecontext(&f.context.context, &thread_main, 0);
#endif
}

void resume(Fiber& f) {
  Engine& e = engine();
  e.current = &f;
  threadIdx = f.index;
  switch_to(e.scheduler, f.context, f.stack->bottom(), kStackBytes, false);
}

// Runs until nobody can; false if somebody waits then.
bool run_threads(const std::vector<int>& order) {
  Engine& e = engine();
  for (bool progress = true; progress;) {
    progress = false;
    for (const int i : order) {
      Fiber& f = *e.fibers[static_cast<std::size_t>(i)];
      if (f.state != State::kReady) continue;
      resume(f);
      if (e.failed) return false;
      progress = true;
    }
  }
  const Fiber *waits = nullptr, *done = nullptr;
  for (int i = 0; i < e.num_threads; ++i) {
    const Fiber& f = *e.fibers[static_cast<std::size_t>(i)];
    (f.state == State::kDone ? done : waits) = &f;
  }
  if (waits == nullptr) return true;
  e.fault = "deadlock: " + place(*waits, waits->where) + " waits in " + waits->what;
  if (done != nullptr) e.fault += ", and others have left the kernel";
  return false;
}

bool margins_are_whole() {
  const Engine& e = engine();
  const unsigned char *const begin = e.shared.data(), *const end = begin + e.shared.size(),
                             *const first = e.shared_begin;
  const auto is_margin = [](unsigned char byte) { return byte == kMarginByte; };
  return std::all_of(begin, first, is_margin) &&
         std::all_of(first + e.shared_bytes, end, is_margin);
}

}  // namespace

Device& device() { return engine().device; }
const std::string& fault() { return engine().fault; }
void clear_fault() { engine().fault.clear(); }
std::int64_t launches() { return engine().launches; }
void next_call(std::function<void()> call) { engine().next = std::move(call); }
std::function<void()> take_next_call() { return std::exchange(engine().next, nullptr); }
int lane_of_this_thread() { return engine().current->lane; }
unsigned char* dynamic_shared() { return engine().shared_begin; }

bool run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& call) {
  Engine& e = engine();
  ++e.launches;
  e.failed = false;
  e.num_threads = static_cast<int>(block.x * block.y * block.z);
  while (e.fibers.size() < static_cast<std::size_t>(e.num_threads))
    e.fibers.push_back(std::make_unique<Fiber>());
  e.call = &call;
  e.shared_bytes = shared_bytes;
  e.shared.resize(shared_bytes + 2 * kMargin + 1024);
  blockDim = block;
  gridDim = grid;

  std::mt19937 random(e.device.order);
  std::vector<int> order(static_cast<std::size_t>(e.num_threads));
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::vector<std::uint64_t> blocks(std::size_t{grid.x} * grid.y * grid.z);
  for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  if (e.device.order != 0) std::shuffle(blocks.begin(), blocks.end(), random);

  for (const std::uint64_t b : blocks) {
    blockIdx = {static_cast<unsigned>(b % grid.x),
                static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    std::fill(e.shared.begin(), e.shared.end(), kMarginByte);
    const std::size_t off = reinterpret_cast<std::size_t>(e.shared.data() + kMargin) % 1024;
    e.shared_begin = e.shared.data() + kMargin + (1024 - off) % 1024;
    std::memset(e.shared_begin, 0xff, shared_bytes);  // NaN: nobody may rely on what is there
    e.warps.assign(static_cast<std::size_t>(e.num_threads + 31) / 32, {});
    e.at_barrier = 0;
    for (int i = 0; i < e.num_threads; ++i) {
      Fiber& f = *e.fibers[static_cast<std::size_t>(i)];
      const unsigned t = static_cast<unsigned>(i);
      f.index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
      f.lane = i % 32;
      f.warp = i / 32;
      e.warps[static_cast<std::size_t>(f.warp)].lanes |= 1u << f.lane;
      f.state = State::kReady;
      f.copies.clear();
      f.group = 0;
      start(f);
    }
    if (e.device.order != 0) std::shuffle(order.begin(), order.end(), random);
    if (!run_threads(order)) return false;
    if (!margins_are_whole()) {
      std::ostringstream text;
      text << "block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z
           << ") wrote outside its " << shared_bytes << " bytes of shared memory";
      e.fault = text.str();
      return false;
    }
  }
  return true;
}

void fail(std::string message) {
  Engine& e = engine();
  e.fault = std::exchange(message, {}) + ": " + place(*e.current, e.current->where);
  e.failed = true;
  leave(true);  // for good: what this stack owns is not given back
  std::abort();
}

void warp_collective(const char* name,
                     unsigned mask,
                     void* lane_data,
                     void (*run)(void* const* lanes, unsigned mask),
                     Where where) {
  Engine& e = engine();
  Fiber& self = *e.current;
  self.where = where;
  self.what = name;
  const unsigned own = 1u << self.lane;
  if ((mask & own) == 0) fail(std::string(name) + " with a mask without this lane");
  Warp& warp = e.warps[static_cast<std::size_t>(self.warp)];
  if ((mask & ~warp.lanes) != 0) fail(std::string(name) + " names a lane that is not there");
  Meeting* meeting = nullptr;
  for (Meeting& other : warp.meetings) {
    if ((other.mask & mask) == 0) {
      if (other.mask == 0 && meeting == nullptr) meeting = &other;
      continue;
    }
    if (other.mask != mask || !same(other.where, where) || std::strcmp(other.name, name) != 0) {
      fail("divergence: some lanes wait in " + std::string(other.name) + " at line " +
           std::to_string(other.where.line()) + ", and for them in " + name);
    }
    meeting = &other;
    break;
  }
  if (meeting == nullptr) fail(std::string(name) + ": too many parts of a warp wait");
  if (meeting->mask == 0) *meeting = {mask, 0, name, where, {}};
  meeting->arrived |= own;
  meeting->data[self.lane] = lane_data;
  if (meeting->arrived != mask) {
    self.state = State::kWaits;
    leave(false);
    return;
  }
  run(meeting->data, mask);
  meeting->mask = 0;
  for (unsigned left = mask; left != 0; left &= left - 1)
    e.fibers[static_cast<std::size_t>(self.warp * 32 + __builtin_ctz(left))]->state = State::kReady;
}

int block_barrier(int predicate, Where where) {
  Engine& e = engine();
  Fiber& self = *e.current;
  self.where = where;
  self.what = "__syncthreads";
  if (e.at_barrier == 0) {
    e.barrier = where;
    e.barrier_sum = 0;
  } else if (!same(e.barrier, where)) {
    fail("divergence: others wait at another barrier, line " + std::to_string(e.barrier.line()) +
         ", __syncthreads");
  }
  e.barrier_sum += predicate;
  if (++e.at_barrier < e.num_threads) {
    self.state = State::kWaits;
    leave(false);
    return self.barrier_sum;
  }
  e.at_barrier = 0;
  for (int i = 0; i < e.num_threads; ++i) {
    Fiber& other = *e.fibers[static_cast<std::size_t>(i)];
    other.barrier_sum = e.barrier_sum;
    other.state = State::kReady;
  }
  return e.barrier_sum;
}

namespace {

float half_of(std::uint32_t pair, int which) {
  static const std::vector<float> all = [] {
    std::vector<float> table(65536);
    for (std::size_t i = 0; i < table.size(); ++i)
      table[i] = half_to_float(static_cast<std::uint16_t>(i));
    return table;
  }();
  return all[pair >> (16 * which) & 0xffff];
}

struct Mma {
  float* c;
  const std::uint32_t *a, *b;
};

void run_mma(void* const* lanes, unsigned) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& own = *static_cast<Mma*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 2; ++i) {
      a[g][2 * t + i] = half_of(own.a[0], i);
      a[g + 8][2 * t + i] = half_of(own.a[1], i);
      a[g][2 * t + 8 + i] = half_of(own.a[2], i);
      a[g + 8][2 * t + 8 + i] = half_of(own.a[3], i);
      b[2 * t + i][g] = half_of(own.b[0], i);
      b[2 * t + 8 + i][g] = half_of(own.b[1], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* const c = static_cast<Mma*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      c[i] += sum;
    }
  }
}

struct Ldmatrix {
  std::uint32_t* d;
  const void* row;
};

void run_ldmatrix(void* const* lanes, unsigned) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      const void* row = static_cast<Ldmatrix*>(lanes[matrix * 8 + lane / 4])->row;
      std::memcpy(static_cast<Ldmatrix*>(lanes[lane])->d + matrix,
                  static_cast<const char*>(row) + 4 * (lane % 4),
                  4);
    }
  }
}

void check_shared(const void* address, std::size_t bytes, const char* name) {
  const Engine& e = engine();
  const unsigned char* const at = static_cast<const unsigned char*>(address);
  if (at < e.shared_begin || at + bytes > e.shared_begin + e.shared_bytes)
    fail(std::string(name) + " outside the block's shared memory");
  if (reinterpret_cast<std::size_t>(at) % bytes != 0)
    fail(std::string(name) + " at an address that is not aligned");
}

}  // namespace

void warp_sum(float* x, int count, Where where) {
  struct Data {
    float* x;
    int count;
  } data{x, count};
  const auto run = [](void* const* lanes, unsigned) {
    const int numbers = static_cast<Data*>(lanes[0])->count;
    for (int j = 0; j < numbers; ++j) {
      float values[32], next[32];
      for (int lane = 0; lane < 32; ++lane) values[lane] = static_cast<Data*>(lanes[lane])->x[j];
      for (int step = 16; step > 0; step /= 2) {
        for (int lane = 0; lane < 32; ++lane) next[lane] = values[lane] + values[lane ^ step];
        std::copy(next, next + 32, values);
      }
      for (int lane = 0; lane < 32; ++lane) static_cast<Data*>(lanes[lane])->x[j] = values[lane];
    }
  };
  warp_collective("warp_sum", 0xffffffffu, &data, run, where);
}

void mma_m16n8k16(float (&c)[4],
                  const std::uint32_t (&a)[4],
                  const std::uint32_t (&b)[2],
                  Where where) {
  Mma data{c, a, b};
  warp_collective("mma", 0xffffffffu, &data, run_mma, where);
}

void ldmatrix_x4(std::uint32_t (&d)[4], const void* row, Where where) {
  check_shared(row, 16, "ldmatrix");
  Ldmatrix data{d, row};
  warp_collective("ldmatrix", 0xffffffffu, &data, run_ldmatrix, where);
}

void cp_async_16(void* to_shared, const void* from, bool valid) {
  check_shared(to_shared, 16, "cp.async");
  if (valid && reinterpret_cast<std::size_t>(from) % 16 != 0)
    fail("cp.async from an address that is not aligned");
  Fiber& self = *engine().current;
  self.copies.push_back({to_shared, from, valid, self.group});
}

void cp_async_commit() { ++engine().current->group; }

void cp_async_wait(int pending) {
  Fiber& self = *engine().current;
  std::size_t done = 0;
  for (; done < self.copies.size() && self.copies[done].group < self.group - pending; ++done) {
    const Copy& copy = self.copies[done];
    if (copy.valid) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace emulated
