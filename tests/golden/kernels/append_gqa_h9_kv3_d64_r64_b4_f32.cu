// append_gqa_h9_kv3_d64_r64_b4_f32
#line 1 "kernels/append.cu.j2"
#include "helix/append.cuh"

struct Config {
  using Element = helix::float32;
  using Cached = helix::float32;
  static constexpr int heads = 9, kv_heads = 3, head_dim = 64, rope_dim = 64;
  static constexpr int block = 4;
  static constexpr bool interleaved = false, mla = false;
  static constexpr int threads = 128;
};

extern "C" __global__ void __launch_bounds__(Config::threads)
append_gqa_h9_kv3_d64_r64_b4_f32(Config::Element* q_out, const Config::Element* q, const Config::Element* k, const Config::Element* v,
           Config::Cached* cache_k, Config::Cached* cache_v, const float* cos, const float* sin,
           const unsigned char* owned, const long long* slots, int rows) {
  helix::append<Config>(q_out, q, k, v, cache_k, cache_v, cos, sin, owned, slots, rows);
}
