// partial_mla_h16_d576_b64_bf16_kvf8_q4
#line 1 "kernels/partial.cu.j2"
#include "helix/partial.cuh"

struct Config {
  using Element = helix::bfloat16;
  using Cached = helix::float8_e4m3fn;
  static constexpr int heads = 16, kv_heads = 1, head_dim = 576, partial_dim = 512;
  static constexpr int block = 64, query_tokens = 4;
  static constexpr bool mla = true;
  static constexpr float scale = 0.07216878364870322f;
  static constexpr int threads = 128, head_tile = 8, token_tile = 16;
};

extern "C" __global__ void __launch_bounds__(Config::threads)
partial_mla_h16_d576_b64_bf16_kvf8_q4(float* o, float* lse, const Config::Element* q, const Config::Cached* cache_k,
           const Config::Cached* cache_v, const unsigned char* k_scale, const unsigned char* v_scale,
           const int* page_table, const int* lengths, int max_pages) {
  helix::partial<Config>(o, lse, q, cache_k, cache_v, k_scale, v_scale, page_table, lengths, max_pages);
}
