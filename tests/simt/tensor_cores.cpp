// wgmma. Each warp of a warpgroup computes its 16 rows of a product when its own turn comes.
#include <algorithm>
#include <cmath>

#include "machine.h"

namespace simt {

namespace {

constexpr unsigned kAll = 0xffffffffu;

bool wide(Element element) { return element != Element::e4m3; }

// The place of sum (row, column) of the warp's rows: lane and index in its registers.
unsigned owner(unsigned row, unsigned column) { return row % 8 * 4 + column % 8 / 2; }
unsigned position(unsigned row, unsigned column) { return column / 8 * 4 + row / 8 * 2 + column % 2; }

// An operand in shared memory, in rows of 128 bytes with the 128-byte swizzle.
struct Operand {
  Block& block;
  u32 start, lead, stride;

  Operand(Block& of, u64 descriptor)
      : block(of),
        start(u32(descriptor & 0x3fff) << 4),
        lead(u32(descriptor >> 16 & 0x3fff) << 4),
        stride(u32(descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1) fail("an operand without the 128-byte swizzle");
    if (descriptor >> 49 & 7) fail("an operand with a base offset");
  }

  // 16 bytes whose address before the swizzle is `offset` from the start.
  const u8* piece(u32 offset) const {
    const u32 address = start + offset;
    return resolve_async(block, address ^ (address >> 3 & 0x70), 16, 16);
  }
};

// to[k][column] of a [k][columns] matrix; `first` + column is its row (k contiguous) or column (transposed).
template <class F> void load(const Operand& from, Element element, bool transposed, unsigned first, unsigned count, F&& to) {
  const unsigned size = wide(element) ? 2 : 1, pieces = 2, per_piece = 16 / size;
  if (!transposed) {
    for (unsigned x = 0; x < count; ++x)
      for (unsigned half = 0; half < pieces; ++half) {
        const unsigned row = first + x;
        const u8* bytes = from.piece(row / 8 * from.stride + row % 8 * 128 + half * 16);
        for (unsigned i = 0; i < per_piece; ++i) {
          unsigned bits = 0;
          std::memcpy(&bits, bytes + i * size, size);
          to(half * per_piece + i, x, to_float(element, bits));
        }
      }
    return;
  }
  if (!wide(element)) fail("a transposed operand of 8-bit elements");
  for (unsigned k = 0; k < 16; ++k)
    for (unsigned x = 0; x < count; x += 8) {
      const unsigned column = first + x;
      const u8* bytes = from.piece(k / 8 * from.stride + k % 8 * 128 + column / 64 * from.lead + column % 64 * 2);
      for (unsigned i = 0; i < 8; ++i) {
        unsigned bits = 0;
        std::memcpy(&bits, bytes + i * 2, 2);
        to(k, x + i, to_float(element, bits));
      }
    }
}

void multiply(float (*sums)[256], const float (*a)[32], const float (*b)[256], unsigned depth, unsigned columns) {
  for (unsigned row = 0; row < 16; ++row)
    for (unsigned k = 0; k < depth; ++k) {
      const float x = a[row][k];
      for (unsigned column = 0; column < columns; ++column) sums[row][column] += x * b[k][column];
    }
}

// The fragment of A that lane `lane` holds in registers: rows lane / 4 and 8 on, 4 bytes of k and 16 bytes on.
void load_registers(const PendingProduct& pending, float (*a)[32]) {
  const bool wide = simt::wide(pending.product.element);
  for (unsigned lane = 0; lane < 32; ++lane)
    for (unsigned word = 0; word < 4; ++word)
      for (unsigned i = 0; i < (wide ? 2u : 4u); ++i) {
        const unsigned bits = wide ? pending.a[lane][word] >> (16 * i) & 0xffff : pending.a[lane][word] >> (8 * i) & 0xff;
        const unsigned k = (lane % 4 + word / 2 * 4) * (wide ? 2 : 4) + i;
        a[lane / 4 + word % 2 * 8][k] = to_float(pending.product.element, bits);
      }
}

void perform_first(Warp& warp) {
  PendingProduct& pending = warp.products.front();
  const Product& product = pending.product;
  Accumulator& sums = *pending.sums;
  alignas(64) static float a[16][32], b[32][256];
  if (product.a_registers) {
    load_registers(pending, a);
  } else {
    const Operand operand(*warp.block, product.a);
    load(operand, product.element, product.a_transposed, warp.first / 32 % 4 * 16, 16,
         [](unsigned k, unsigned row, float x) { a[row][k] = x; });
  }
  load(Operand(*warp.block, product.b), product.element, product.b_transposed, 0, product.columns,
       [](unsigned k, unsigned column, float x) { b[k][column] = x; });
  if (!product.accumulate) std::memset(sums.sums, 0, sizeof sums.sums);
  multiply(sums.sums, a, b, wide(product.element) ? 16 : 32, product.columns);
  if (--sums.products == 0) {
    for (unsigned row = 0; row < 16; ++row)
      for (unsigned column = 0; column < sums.columns; ++column)
        sums.registers[owner(row, column)][position(row, column)] = sums.sums[row][column];
    warp.sums.erase(std::find_if(warp.sums.begin(), warp.sums.end(), [&](const auto& x) { return x.get() == &sums; }));
  }
  warp.products.pop_front();
}

Accumulator& accumulator(Warp& warp, const Lanes& lanes, unsigned columns) {
  float* first = lanes.at<Product>(0).d;
  for (auto& sums : warp.sums)
    if (sums->registers[0] == first) {
      if (sums->columns != columns) fail("two products of %u and %u columns in the same registers", sums->columns, columns);
      return *sums;
    }
  warp.sums.push_back(std::make_unique<Accumulator>());
  Accumulator& sums = *warp.sums.back();
  sums.columns = columns;
  sums.products = 0;
  for (unsigned lane = 0; lane < 32; ++lane) sums.registers[lane] = lanes.at<Product>(lane).d;
  for (unsigned row = 0; row < 16; ++row)
    for (unsigned column = 0; column < columns; ++column) {
      float& x = sums.registers[owner(row, column)][position(row, column)];
      sums.sums[row][column] = x;
      x = NAN;  // undefined until somebody has waited
    }
  return sums;
}

bool same(const Product& x, const Product& y) {
  return x.columns == y.columns && x.element == y.element && x.accumulate == y.accumulate &&
         x.a_transposed == y.a_transposed && x.b_transposed == y.b_transposed &&
         !x.a_registers == !y.a_registers && (x.a_registers || x.a == y.a) && x.b == y.b;
}

void start_product(const Lanes& lanes) {
  Warp& warp = *machine.current->warp;
  const Product& product = lanes.at<Product>(0);
  if (lanes.present != kAll) fail("wgmma by lanes %08x only", lanes.present);
  for (unsigned lane = 1; lane < 32; ++lane)
    if (!same(product, lanes.at<Product>(lane))) fail("the lanes of a warp differ in their wgmma");
  if (!warp.fenced) fail("wgmma without wgmma.fence since the last wait");
  PendingProduct pending = {product, {}, &accumulator(warp, lanes, product.columns), warp.groups};
  ++pending.sums->products;
  if (product.a_registers)
    for (unsigned lane = 0; lane < 32; ++lane) std::memcpy(pending.a[lane], lanes.at<Product>(lane).a_registers, 16);
  warp.products.push_back(pending);
  if (machine.launch.asynchrony == Asynchrony::early) perform_first(warp);
}

}  // namespace

float to_float(Element element, unsigned bits) {
  if (element == Element::bfloat16) {
    const u32 word = bits << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
  }
  if (element == Element::float16) {
    const std::uint16_t half = std::uint16_t(bits);
    _Float16 x;
    std::memcpy(&x, &half, 2);
    return float(x);
  }
  const unsigned exponent = bits >> 3 & 15, fraction = bits & 7;
  const float sign = bits & 0x80 ? -1.0f : 1.0f;
  if (exponent == 15 && fraction == 7) return NAN;
  return sign * (exponent == 0 ? std::ldexp(float(fraction), -9) : std::ldexp(float(8 + fraction), int(exponent) - 10));
}

void wgmma(const Product& product) {
  Product mine = product;
  meet("wgmma", kAll, &mine, start_product);
}

void wgmma_fence() {
  meet("wgmma.fence", kAll, nullptr, [](const Lanes&) { machine.current->warp->fenced = true; });
}

void wgmma_commit() {
  meet("wgmma.commit_group", kAll, nullptr, [](const Lanes&) { ++machine.current->warp->groups; });
}

void wgmma_wait(unsigned pending) {
  meet("wgmma.wait_group", kAll, &pending, [](const Lanes& lanes) {
    Warp& warp = *machine.current->warp;
    const unsigned may_be_pending = lanes.at<unsigned>(0);
    while (!warp.products.empty() && warp.products.front().group + may_be_pending < warp.groups) perform_first(warp);
    warp.fenced = false;
  });
}

void perform_some_product() {
  Cluster& cluster = *machine.clusters[choice(unsigned(machine.clusters.size()))];
  Block& block = cluster.blocks[choice(unsigned(cluster.blocks.size()))];
  Warp& warp = block.warps[choice(unsigned(block.warps.size()))];
  if (!warp.products.empty()) perform_first(warp);
}

void clear_products(Warp& warp) {
  warp.products.clear();
  warp.sums.clear();
  warp.fenced = false;
}

}  // namespace simt
