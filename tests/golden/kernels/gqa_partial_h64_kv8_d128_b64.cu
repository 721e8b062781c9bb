// gqa_partial_h64_kv8_d128_b64
#line 1 "kernels/gqa_partial.cu.j2"
#include "helix/gqa_partial.cuh"

struct Config {
  static constexpr int kv_heads = 8, group = 8, head_dim = 128, block = 64;
  static constexpr int query_tokens = 1, share_tokens = 1, share_heads = 8;
  static constexpr int tile = 64, stages = 4, cluster = 1;
  static constexpr bool fp8 = false;
  static constexpr float scale = 0.08838834764831845f;
  static constexpr helix::Overlap overlap = helix::Overlap::old_tokens;
};

static_assert(sizeof(helix::GqaShared<Config>) <= 135168, "the launch gives too little shared memory");
static_assert(helix::GqaTile<Config>::threads + helix::kWarp == 160, "all warps but one compute");

#if 1 > 1
#define CLUSTER_DIMS __cluster_dims__(1, 1, 1)
#else
#define CLUSTER_DIMS
#endif

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(160, 1)
gqa_partial_h64_kv8_d128_b64(const __grid_constant__ helix::TensorMap k, const __grid_constant__ helix::TensorMap v, helix::bfloat16* o,
           float* lse, float* part_o, float* part_lse, const helix::bfloat16* q, const int* page_table,
           const int* lengths, const int* schedule, int rows, int max_pages, const helix::u8* k_scale,
           const helix::u8* v_scale) {
  helix::gqa_partial<Config>(&k, &v, {o, lse, q, page_table, lengths, schedule, {part_o, part_lse}, rows, max_pages,
                                      k_scale, v_scale});
}
