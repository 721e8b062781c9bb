// combine_cp2_p512_bf16
#line 1 "kernels/combine.cu.j2"
#include "helix/combine.cuh"

// The partials of the cp ranks, after the exchange.
struct Config {
  using Part = helix::bfloat16;
  using Element = helix::bfloat16;
  static constexpr int partial_dim = 512;
  static constexpr int threads = 128, columns = 8, batch = 2;
};

extern "C" __global__ void __launch_bounds__(Config::threads)
combine_cp2_p512_bf16(Config::Element* o_out, float* lse_out, const Config::Part* o, const float* lse, int rows) {
  helix::combine<Config>(o_out, lse_out, o, lse, 2, rows);
}
