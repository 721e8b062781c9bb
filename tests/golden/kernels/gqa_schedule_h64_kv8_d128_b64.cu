// gqa_schedule_h64_kv8_d128_b64
#line 1 "kernels/gqa_schedule.cu.j2"
#include "helix/gqa_schedule.cuh"

struct Config {
  static constexpr int kv_heads = 8, group = 8, head_dim = 128, block = 64;
  static constexpr int query_tokens = 1, share_tokens = 1, share_heads = 8;
  static constexpr int tile = 64;
};

extern "C" __global__ void __launch_bounds__(32)
gqa_schedule_h64_kv8_d128_b64(int* schedule, const int* lengths, const int* page_table, int rows, int max_pages) {
  static_assert(32 == helix::kWarp, "one warp a thread block");
  helix::gqa_schedule<Config>(schedule, lengths, page_table, rows, max_pages);
}
