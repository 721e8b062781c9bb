// exchange_cp2_h32_p128_bf16
#line 1 "kernels/exchange.cu.j2"
#include "helix/exchange.cuh"

struct Config {
  using Element = helix::bfloat16;
  static constexpr int members = 2, heads = 32, partial_dim = 128;
  static constexpr int threads = 64, pieces = 1;
};

extern "C" __global__ void __launch_bounds__(Config::threads, 8)
exchange_cp2_h32_p128_bf16(Config::Element* o_out, const Config::Element* o, const float* lse, const unsigned long long* inboxes,
           const helix::Progress* progress, helix::Status* status, unsigned long long limit, int rank, int index,
           int call, int rows, int max_rows) {
  helix::exchange<Config>(o_out, o, lse, {inboxes, progress, status, limit, rank, index, call}, rows, max_rows);
}
