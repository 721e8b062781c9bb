// merge_p512_bf16
#line 1 "kernels/merge.cu.j2"
#include "helix/combine.cuh"

// The splits of one rank; their number is a launch argument.
struct Config {
  using Part = helix::float32;
  using Element = helix::bfloat16;
  static constexpr int partial_dim = 512;
  static constexpr int threads = 128, columns = 4, batch = 8;
};

extern "C" __global__ void __launch_bounds__(Config::threads)
merge_p512_bf16(Config::Element* o_out, float* lse_out, const Config::Part* o, const float* lse, int splits, int rows) {
  helix::combine<Config>(o_out, lse_out, o, lse, splits, rows);
}
