// What Hopper (sm_90a) has besides: products of a warpgroup, four warps of a block whose first is a multiple of four,
// which read their second operand from shared memory by themselves. As in simt.cuh, the emulation has the same names.
#pragma once

#include "simt.cuh"

#ifdef ODEBLOCK_EMULATED
#include "warpgroup.h"
#else

namespace odeblock {
namespace simt {

// Whether the code that is being compiled is for a GPU that has them.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kWarpgroups = true;
#else
constexpr bool kWarpgroups = false;
#endif

// What this thread wrote to shared memory, asynchronous copies included, is there for the products that come after a
// barrier.
ODEBLOCK_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A matrix [N, 16] of 16-bit numbers in shared memory, a part of the columns of [N, kRowBytes / 2]: rows of kRowBytes
// (64 or 128) one after the other from a multiple of 8 of them on, where bits 4 and on of an address are exchanged with
// bits 7 and on of it (xor; two bits for 64 bytes, three for 128). Transposed: [16, N], rows likewise; columns beyond
// kRowBytes / 2 of them lie `leading` bytes further on.
template <int kRowBytes>
ODEBLOCK_DEVICE uint64_t matrix_descriptor(const void* first, int leading = 16) {
  constexpr uint64_t kSwizzle = kRowBytes == 128 ? 1 : 2, kEightRows = 8 * kRowBytes;
  return kSwizzle << 62 | (kEightRows >> 4) << 32 | static_cast<uint64_t>(leading >> 4) << 16 |
         (shared_address(first) & 0x3ffff) >> 4;
}

// Products read and write their registers until they are waited for. before_products: what was done to d, unless it is
// fresh, and to a comes before; after_products: all products are done, and nothing that reads d comes before.
template <class Tile, int kTiles>
ODEBLOCK_DEVICE void pin(Tile (&d)[kTiles]) {
#pragma unroll
  for (int n = 0; n < kTiles; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+f"(d[n].x[i])::"memory");
}
template <bool kFresh, class Tile, int kTiles, int kOperands>
ODEBLOCK_DEVICE void before_products(Tile (&d)[kTiles], uint32_t (&a)[kOperands][4]) {
  if constexpr (!kFresh) pin(d);
#pragma unroll
  for (int j = 0; j < kOperands; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) asm volatile("" : "+r"(a[j][i])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
ODEBLOCK_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <class Tile, int kTiles>
ODEBLOCK_DEVICE void after_products(Tile (&d)[kTiles]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  pin(d);
}

// d += a Mᵀ, or fresh: d = a Mᵀ, for a warpgroup: d [64, 8 kTiles], of which warp w has rows 16 w and on as in mma; a
// [64, 16] likewise; M [8 kTiles, 16] in shared memory. Transposed: a M, for M [16, 8 kTiles].
#define ODEBLOCK_FOUR(n) "+f"(d[n].x[0]), "+f"(d[n].x[1]), "+f"(d[n].x[2]), "+f"(d[n].x[3])
#define ODEBLOCK_SIXTEEN(n) ODEBLOCK_FOUR(n), ODEBLOCK_FOUR(n + 1), ODEBLOCK_FOUR(n + 2), ODEBLOCK_FOUR(n + 3)
#define ODEBLOCK_SIXTYFOUR(n) \
  ODEBLOCK_SIXTEEN(n), ODEBLOCK_SIXTEEN(n + 4), ODEBLOCK_SIXTEEN(n + 8), ODEBLOCK_SIXTEEN(n + 12)
#define ODEBLOCK_WGMMA(type, columns, registers, a_registers, matrix_register, adds, transposed, ...)          \
  asm volatile("{ .reg .pred add; setp.ne.b32 add, " adds ", 0; wgmma.mma_async.sync.aligned.m64n" columns     \
               "k16.f32." type "." type " {" registers "}, {" a_registers "}, " matrix_register                \
               ", add, 1, 1, " transposed "; }"                                                                \
               : __VA_ARGS__                                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(matrix), "r"(fresh ? 0 : 1), "n"(kTransposed) \
               : "memory")
#define ODEBLOCK_REGISTERS_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ODEBLOCK_REGISTERS_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ODEBLOCK_REGISTERS_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define ODEBLOCK_REGISTERS_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ODEBLOCK_REGISTERS_4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define ODEBLOCK_REGISTERS_5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define ODEBLOCK_REGISTERS_6 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define ODEBLOCK_REGISTERS_7 \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

template <bool kBfloat16, bool kTransposed, class Tile, int kTiles>
ODEBLOCK_DEVICE void multiply_warpgroup(bool fresh, Tile (&d)[kTiles], const uint32_t (&a)[4], uint64_t matrix) {
  static_assert(kTiles == 4 || kTiles == 8 || kTiles == 16 || kTiles == 32);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (kTiles == 4) {
    if constexpr (kBfloat16)
      ODEBLOCK_WGMMA("bf16", "32", ODEBLOCK_REGISTERS_0, "%16, %17, %18, %19", "%20", "%21", "%22",
                     ODEBLOCK_SIXTEEN(0));
    else
      ODEBLOCK_WGMMA("f16", "32", ODEBLOCK_REGISTERS_0, "%16, %17, %18, %19", "%20", "%21", "%22", ODEBLOCK_SIXTEEN(0));
  }
  if constexpr (kTiles == 8) {
    if constexpr (kBfloat16)
      ODEBLOCK_WGMMA("bf16", "64", ODEBLOCK_REGISTERS_0 ", " ODEBLOCK_REGISTERS_1, "%32, %33, %34, %35", "%36", "%37",
                     "%38", ODEBLOCK_SIXTEEN(0), ODEBLOCK_SIXTEEN(4));
    else
      ODEBLOCK_WGMMA("f16", "64", ODEBLOCK_REGISTERS_0 ", " ODEBLOCK_REGISTERS_1, "%32, %33, %34, %35", "%36", "%37",
                     "%38", ODEBLOCK_SIXTEEN(0), ODEBLOCK_SIXTEEN(4));
  }
  if constexpr (kTiles == 16) {
    if constexpr (kBfloat16)
      ODEBLOCK_WGMMA("bf16", "128",
                     ODEBLOCK_REGISTERS_0 ", " ODEBLOCK_REGISTERS_1 ", " ODEBLOCK_REGISTERS_2 ", " ODEBLOCK_REGISTERS_3,
                     "%64, %65, %66, %67", "%68", "%69", "%70", ODEBLOCK_SIXTYFOUR(0));
    else
      ODEBLOCK_WGMMA("f16", "128",
                     ODEBLOCK_REGISTERS_0 ", " ODEBLOCK_REGISTERS_1 ", " ODEBLOCK_REGISTERS_2 ", " ODEBLOCK_REGISTERS_3,
                     "%64, %65, %66, %67", "%68", "%69", "%70", ODEBLOCK_SIXTYFOUR(0));
  }
  if constexpr (kTiles == 32) {
    if constexpr (kBfloat16)
      ODEBLOCK_WGMMA("bf16", "256",
                     ODEBLOCK_REGISTERS_0 ", " ODEBLOCK_REGISTERS_1 ", " ODEBLOCK_REGISTERS_2 ", " ODEBLOCK_REGISTERS_3
                                          ", " ODEBLOCK_REGISTERS_4 ", " ODEBLOCK_REGISTERS_5 ", " ODEBLOCK_REGISTERS_6
                                          ", " ODEBLOCK_REGISTERS_7,
                     "%128, %129, %130, %131", "%132", "%133", "%134", ODEBLOCK_SIXTYFOUR(0), ODEBLOCK_SIXTYFOUR(16));
    else
      ODEBLOCK_WGMMA("f16", "256",
                     ODEBLOCK_REGISTERS_0 ", " ODEBLOCK_REGISTERS_1 ", " ODEBLOCK_REGISTERS_2 ", " ODEBLOCK_REGISTERS_3
                                          ", " ODEBLOCK_REGISTERS_4 ", " ODEBLOCK_REGISTERS_5 ", " ODEBLOCK_REGISTERS_6
                                          ", " ODEBLOCK_REGISTERS_7,
                     "%128, %129, %130, %131", "%132", "%133", "%134", ODEBLOCK_SIXTYFOUR(0), ODEBLOCK_SIXTYFOUR(16));
  }
#endif
}

#undef ODEBLOCK_FOUR
#undef ODEBLOCK_SIXTEEN
#undef ODEBLOCK_SIXTYFOUR
#undef ODEBLOCK_WGMMA
#undef ODEBLOCK_REGISTERS_0
#undef ODEBLOCK_REGISTERS_1
#undef ODEBLOCK_REGISTERS_2
#undef ODEBLOCK_REGISTERS_3
#undef ODEBLOCK_REGISTERS_4
#undef ODEBLOCK_REGISTERS_5
#undef ODEBLOCK_REGISTERS_6
#undef ODEBLOCK_REGISTERS_7

}  // namespace simt
}  // namespace odeblock
#endif
