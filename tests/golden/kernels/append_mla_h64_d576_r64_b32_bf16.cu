// append_mla_h64_d576_r64_b32_bf16
#line 1 "kernels/append.cu.j2"
#include "helix/append.cuh"

struct Config {
  using Element = helix::bfloat16;
  using Cached = helix::bfloat16;
  static constexpr int heads = 64, kv_heads = 1, head_dim = 576, rope_dim = 64;
  static constexpr int block = 32;
  static constexpr bool interleaved = true, mla = true;
  static constexpr int threads = 128;
};

extern "C" __global__ void __launch_bounds__(Config::threads)
append_mla_h64_d576_r64_b32_bf16(Config::Element* q_out, const Config::Element* q, const Config::Element* k, const Config::Element* v,
           Config::Cached* cache_k, Config::Cached* cache_v, const float* cos, const float* sin,
           const unsigned char* owned, const long long* slots, int rows) {
  helix::append<Config>(q_out, q, k, v, cache_k, cache_v, cos, sin, owned, slots, rows);
}
