// The CUDA softmax family against double precision: rows of a few lanes, of a block, of a cluster, too long for shared
// memory, and rows that are adjacent while their classes are far apart.
#include "cuda/launch.h"
#include "device_memory.h"
#include "softmax_cases.h"

namespace test {
namespace {

// Around the vectors of 16 bytes, of a warp's registers (256, 512 or 1024 elements) and of several warps.
constexpr int64_t kRowClasses[] = {1, 2, 7, 8, 9, 17, 33, 129, 255, 512, 1017, 1030, 2051};

struct Cuda {
  template <class... Buffers>
  static void run(SoftmaxCall call, rf::DType dtype, const rf::SoftmaxProblem& p, int64_t rows, Buffers&... buffers) {
    using namespace rf::cuda;
    constexpr decltype(&launch_softmax_forward) kLaunchers[] = {launch_softmax_forward, launch_softmax_backward,
                                                                launch_logsumexp_forward, launch_logsumexp_backward};
    const LentAll<Buffers...> lent(buffers...);
    kLaunchers[(int)call](dtype, {p, rows}, nullptr);
  }
};

template <class T>
void all() {
  Random random(100 + (int)Format<T>::dtype);
  const auto any = [&](int arrangements) { return kArrangements[random.integer(0, arrangements - 1)]; };
  for (int64_t classes : kRowClasses) {
    const RowShape s = classes > 500 ? RowShape{2, 2, classes} : RowShape{3, 5, classes};
    // Rows where they usually lie, apart in alignment, and everywhere else.
    softmax_forward<Cuda, T>(s, {}, random.chance(0.5), random);
    for (int i = 0; i < (classes > 500 ? 2 : 4); ++i) {
      const SoftmaxLayout w = {any(kInputArrangements), any(kInputArrangements), any(kOutputArrangements),
                               random.integer(0, 9), 0};
      const bool log = random.chance(0.5);
      softmax_forward<Cuda, T>(s, w, log, random);
      softmax_backward<Cuda, T>(s, w, !log, random);
      logsumexp<Cuda, T>(s, w, random);
    }
    softmax_backward<Cuda, T>(s, {Arrangement::rows, Arrangement::padded, Arrangement::rows, 1, 0}, random.chance(0.5),
                              random);
  }
  for (double special : {kNaN, kInfinity, -kInfinity})
    for (int64_t classes : {1, 5, 1500})
      softmax_special_value<Cuda, T>(special, classes, classes / 3,
                                     random.chance(0.5) ? Arrangement::rows : Arrangement::inner);
}

// Beyond 64 KiB rows are cut among the blocks of a cluster, where there are any; beyond what shared memory holds they
// are read twice.
template <class T>
void long_rows(int64_t bytes) {
  Random random(150 + (int)Format<T>::dtype);
  const RowShape s = {1, 1, bytes / (int64_t)sizeof(T) + 3};
  const SoftmaxLayout w = {Arrangement::rows, Arrangement::rows, Arrangement::rows, 1, 0};
  softmax_forward<Cuda, T>(s, w, false, random);
  softmax_backward<Cuda, T>(s, w, true, random);
  logsumexp<Cuda, T>(s, w, random);
}

}  // namespace

TEST(softmax) {
  each_dtype([](auto element) { all<decltype(element)>(); });
  long_rows<bf16>(70 << 10);
  long_rows<float>(180 << 10);
}

}  // namespace test
