// Sums of any number of doubles whose error does not grow with it (Ogita, Rump and Oishi, "Accurate sum and dot
// product", 2005): each addition's rounding error is found by Knuth's TwoSum, without a branch, and added in the end.
#pragma once

namespace rf {

struct CompensatedSum {
  double sum = 0, lost = 0;

  void add(double x) {
    const double next = sum + x, part = next - sum;
    lost += (sum - (next - part)) + (x - part);
    sum = next;
  }
  void add(const CompensatedSum& other) {
    add(other.sum);
    lost += other.lost;
  }
  // What was lost of an infinite sum is NaN.
  double value() const { return lost - lost == 0 ? sum + lost : sum; }
};

}  // namespace rf
