// merge_exchange_cp2_h64_p512_bf16
#line 1 "kernels/merge_exchange.cu.j2"
#include "helix/merge_exchange.cuh"

struct Config {
  using Element = helix::bfloat16;
  static constexpr int members = 2, heads = 64, partial_dim = 512;
  static constexpr int row_tokens = 1, queries = members * heads * row_tokens;
  static constexpr int threads = 128, batch = 5, pieces = partial_dim / helix::kPieceColumns;
};

extern "C" __global__ void __launch_bounds__(Config::threads, 8)
merge_exchange_cp2_h64_p512_bf16(Config::Element* o_out, const Config::Element* o, const float* lse, const helix::bfloat16* part_o,
           const float* part_lse, const helix::SplitRow* split, const int* split_count,
           const unsigned long long* inboxes, const helix::Progress* progress, helix::Status* status,
           unsigned long long limit, int rank, int index, int call, int rows, int max_rows, int mergers) {
  helix::merge_exchange<Config>(o_out, o, lse, {part_o, part_lse, split, split_count},
                                {inboxes, progress, status, limit, rank, index, call}, rows, max_rows, mergers);
}
