// Squared error and its gradients, against double precision.
#include <algorithm>
#include <cmath>

#include "cuda/launch.h"
#include "device_memory.h"
#include "mse_loss_reference.h"

namespace test {
namespace {

// Around vectors of 16 bytes, a block of 256 of them, and several blocks.
constexpr int64_t kSizes[] = {1, 3, 7, 8, 9, 31, 1023, 2050, 9001};

template <class T>
void mse_loss(int64_t n, Random& random) {
  describe("mse_loss %s n=%lld", Format<T>::name, (long long)n);
  const auto spiky = [&] { return random.spiky(); };
  const int64_t shift = random.integer(0, 2), other = random.chance(0.5) ? shift : random.integer(0, 2);
  const Buffer<T> x = input<T>(n, spiky, Guard::behind, shift), y = input<T>(n, spiky, Guard::behind, other);
  const Buffer<T> g = input<T>(n, spiky, Guard::behind, other), one = input<T>(1, spiky);
  Buffer<T> each(n, Guard::behind, shift), total(1);
  Buffer<char> workspace(rf::cuda::mse_loss_workspace(n));
  const double scale = 1.0 / 3;
  {
    const Lent lx(x), ly(y), le(each), lt(total), lw(workspace);
    rf::cuda::launch_mse_loss(Format<T>::dtype, x.data(), y.data(), each.data(), nullptr, 0, nullptr, n, nullptr);
    rf::cuda::launch_mse_loss(Format<T>::dtype, x.data(), y.data(), nullptr, total.data(), scale, workspace.data(), n,
                              nullptr);
  }
  const double expected = check_each_mse_loss(x, y, each);
  {
    Comparison<T> compare("total");
    compare.add(total.result(0), expected * scale, expected * scale * sum_error(std::min<int64_t>(n, 64)), 0);
  }
  CHECK(each.rest_untouched());
  for (const bool each_grad : {false, true})
    for (int wanted = 1; wanted <= 3; ++wanted) {
      Buffer<T> dx(n, Guard::behind, shift), dy(n, Guard::behind, random.integer(0, 3));
      {
        const Lent lx(x), ly(y), lg(g), lo(one), ldx(dx), ldy(dy);
        rf::cuda::launch_mse_loss_backward(Format<T>::dtype, x.data(), y.data(), each_grad ? g.data() : one.data(),
                                           each_grad, scale, wanted & 1 ? dx.data() : nullptr,
                                           wanted & 2 ? dy.data() : nullptr, n, nullptr);
      }
      check_mse_loss_backward(x, y, each_grad ? g : one, scale, wanted & 1 ? &dx : nullptr, wanted & 2 ? &dy : nullptr);
    }
}

// The sum of nothing: zero, and without a single element to read.
template <class T>
void nothing() {
  describe("mse_loss %s of nothing", Format<T>::name);
  Buffer<T> total(1);
  Buffer<char> workspace(rf::cuda::mse_loss_workspace(0));
  {
    const Lent lt(total), lw(workspace);
    rf::cuda::launch_mse_loss(Format<T>::dtype, nullptr, nullptr, nullptr, total.data(), 1, workspace.data(), 0,
                              nullptr);
  }
  CHECK(total.value(0) == 0);
}

template <class T>
void all() {
  Random random(310 + (int)Format<T>::dtype);
  for (const int64_t n : kSizes) mse_loss<T>(n, random);
  nothing<T>();
}

}  // namespace

TEST(mse_loss) {
  each_dtype([](auto element) { all<decltype(element)>(); });
}

}  // namespace test
