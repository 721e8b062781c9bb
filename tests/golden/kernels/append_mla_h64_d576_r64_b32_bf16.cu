// append_mla_h64_d576_r64_b32_bf16
#line 1 "kernels/append.cu.j2"
#include "helix/append.cuh"

struct Config {
  using Element = helix::bfloat16;
  using Cached = helix::bfloat16;
  static constexpr int heads = 64, kv_heads = 1, head_dim = 576, rope_dim = 64;
  static constexpr int block = 32;
  static constexpr bool interleaved = true, mla = true, qk_norm = false;
  static constexpr float norm_eps = 1e-06f;
  static constexpr int threads = 128, lanes = 32, columns = 8;
};

extern "C" __global__ void __launch_bounds__(Config::threads)
append_mla_h64_d576_r64_b32_bf16(Config::Element* q_out, const Config::Element* q_plain, const Config::Element* q_rotary,
           const Config::Element* k, const Config::Element* v, const Config::Element* q_norm,
           const Config::Element* k_norm, Config::Cached* cache_k, Config::Cached* cache_v, unsigned char* k_scale,
           unsigned char* v_scale, const float* cos, const float* sin, const unsigned char* owned,
           const long long* slots, int rows, int q_plain_row, int q_plain_head, int q_rotary_row, int q_rotary_head,
           int k_row, int k_head, int v_row, int v_head) {
  helix::append<Config>({q_out, q_plain, q_rotary, k, v, q_norm, k_norm, cache_k, cache_v, k_scale, v_scale, cos, sin,
                         owned, slots, rows, q_plain_row, q_plain_head, q_rotary_row, q_rotary_head, k_row, k_head,
                         v_row, v_head});
}
