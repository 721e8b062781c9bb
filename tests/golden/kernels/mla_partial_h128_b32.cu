// mla_partial_h128_b32
#line 1 "kernels/mla_partial.cu.j2"
#include "helix/mla_partial.cuh"

struct Config {
  static constexpr int heads = 128, block = 32, cluster = 2;
  static constexpr int row_tokens = 1, cluster_tokens = 1;
  static constexpr int queries = heads * cluster_tokens, team = row_tokens / cluster_tokens;
  static constexpr int shares = 1 / row_tokens;  // rows that read the same pages
  static constexpr float scale = 0.07216878364870322f;
};

#if 2 > 1
#define CLUSTER_DIMS __cluster_dims__(2, 1, 1)
#else
#define CLUSTER_DIMS
#endif

static_assert(helix::MlaShared::bytes <= 231424 && 512 == 4 * 128, "what the launch gives");

extern "C" __global__ void __launch_bounds__(512, 1) CLUSTER_DIMS
mla_partial_h128_b32(const __grid_constant__ helix::TensorMap q, const __grid_constant__ helix::TensorMap kv,
           const __grid_constant__ helix::TensorMap rotary, helix::bfloat16* o, float* lse, helix::bfloat16* part_o,
           float* part_lse, const int* page_table, const helix::Segment* segments, int max_pages, const int* lengths) {
  helix::mla_partial<Config>({o, lse, part_o, part_lse, page_table, segments, max_pages, lengths}, {&q, &kv, &rotary});
}
