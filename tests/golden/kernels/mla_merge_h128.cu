// mla_merge_h128
#line 1 "kernels/mla_merge.cu.j2"
#include "helix/mla_merge.cuh"

struct Config {
  static constexpr int queries = 128 * 1, partial_dim = 512, threads = 512;
  static constexpr int max_splits = 148, row_tokens = 1;
};

extern "C" __global__ void __launch_bounds__(Config::threads, 2)
mla_merge_h128(helix::bfloat16* o, float* lse, const helix::bfloat16* part_o, const float* part_lse,
           const helix::SplitRow* split, const int* split_count) {
  helix::merge_splits<Config>(o, lse, part_o, part_lse, split, split_count);
}
