// The instructions of csrc/cpu/amx.h as functions, for processors without the matrix unit; a compiler option includes
// this file in front of all else. The tiles' shapes are checked, and a product is what Intel's manual says (Software
// Developer's Manual, volume 2, TDPBF16PS).
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/vec.h"  // which includes the instructions themselves

namespace flux::cpu::FLUX_ISA {

struct AmxMachine {
  uint32_t tiles[8][16][16];
  bool configured = false;

  static AmxMachine& of_this_thread() {
    static thread_local AmxMachine machine;
    return machine;
  }

  static void require(bool holds, const char* rule) {
    if (holds) return;
    std::fprintf(stderr, "AMX: %s\n", rule);
    std::abort();
  }

  void load_config(const void* shape) {
    uint8_t bytes[64], expected[64] = {1};
    std::memcpy(bytes, shape, 64);
    for (int i = 0; i < 8; ++i) expected[16 + 2 * i] = 64, expected[48 + i] = 16;
    require(!std::memcmp(bytes, expected, 64), "palette 1, eight tiles of 16 rows of 64 bytes");
    std::memset(tiles, 0, sizeof(tiles));
    configured = true;
  }
  void release() { configured = false; }

  void load(int tile, const void* from, int64_t row_bytes) {
    require(configured, "a tile was loaded without a configuration");
    for (int row = 0; row < 16; ++row)
      std::memcpy(tiles[tile][row], static_cast<const char*>(from) + row * row_bytes, 64);
  }
  void store(int tile, void* to, int64_t row_bytes) {
    require(configured, "a tile was stored without a configuration");
    for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(to) + row * row_bytes, tiles[tile][row], 64);
  }
  void zero(int tile) { std::memset(tiles[tile], 0, sizeof(tiles[tile])); }

  // Subnormal numbers count as zero, on the way in and out.
  static float flushed(float x) { return (float_to_bits(x) & 0x7f800000u) ? x : 0.f; }

  void multiply(int c, int a, int b) {
    require(configured, "tiles were multiplied without a configuration");
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 16; ++column)
          for (int half = 0; half < 2; ++half) {
            const float x = flushed(bits_to_float(half ? tiles[a][row][k] & 0xffff0000u : tiles[a][row][k] << 16));
            const float y =
                flushed(bits_to_float(half ? tiles[b][k][column] & 0xffff0000u : tiles[b][k][column] << 16));
            uint32_t& sum = tiles[c][row][column];
            sum = float_to_bits(flushed(bits_to_float(sum) + x * y));
          }
  }
};

}  // namespace flux::cpu::FLUX_ISA

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(shape) AmxMachine::of_this_thread().load_config(shape)
#define _tile_release() AmxMachine::of_this_thread().release()
#define _tile_loadd(tile, from, bytes) AmxMachine::of_this_thread().load(tile, from, bytes)
#define _tile_stored(tile, to, bytes) AmxMachine::of_this_thread().store(tile, to, bytes)
#define _tile_zero(tile) AmxMachine::of_this_thread().zero(tile)
#define _tile_dpbf16ps(c, a, b) AmxMachine::of_this_thread().multiply(c, a, b)
