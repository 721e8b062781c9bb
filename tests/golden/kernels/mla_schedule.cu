// mla_schedule
#line 1 "kernels/mla_schedule.cu.j2"
#include "helix/mla_schedule.cuh"

extern "C" __global__ void __launch_bounds__(256)
mla_schedule(helix::Segment* segments, helix::SplitRow* split, int* split_count, const int* lengths, int rows,
           int workers) {
  helix::make_schedule<1>({segments, split, split_count}, lengths, rows, workers);
}
