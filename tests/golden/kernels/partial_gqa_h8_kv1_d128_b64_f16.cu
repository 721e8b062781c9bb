// partial_gqa_h8_kv1_d128_b64_f16
#line 1 "kernels/partial.cu.j2"
#include "helix/partial.cuh"

struct Config {
  using Element = helix::float16;
  using Cached = helix::float16;
  static constexpr int heads = 8, kv_heads = 1, head_dim = 128, partial_dim = 128;
  static constexpr int block = 64, query_tokens = 1;
  static constexpr bool mla = false;
  static constexpr float scale = 0.08838834764831845f;
  static constexpr int threads = 128, head_tile = 8, token_tile = 64;
};

extern "C" __global__ void __launch_bounds__(Config::threads)
partial_gqa_h8_kv1_d128_b64_f16(float* o, float* lse, const Config::Element* q, const Config::Cached* cache_k,
           const Config::Cached* cache_v, const unsigned char* k_scale, const unsigned char* v_scale,
           const int* page_table, const int* lengths, int max_pages) {
  helix::partial<Config>(o, lse, q, cache_k, cache_v, k_scale, v_scale, page_table, lengths, max_pages);
}
