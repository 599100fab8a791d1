// The codes and scales inside GGUF blocks of 32 and 64 values: what kernels.pack and kernels.unpack move.
//
// Specification: the PACK and UNPACK tables of reference/legacy.py and reference/fp4.py.
#pragma once
#include "packing.h"

namespace lconvert::packing {

// A block: ScaleBytes of scales, then 2 bytes of float16 minimum if HasOffset (the part "offset" is its negative), then
// 4 bytes of fifth bits if Bits is 5, then nibbles: code j of a run of 2 * Half codes is the low nibble of its byte j,
// code j + Half the high one. Q8_0 has whole bytes. Zero is added to a code before it is stored.
template <int Bits, int Half, int ScaleBytes, bool HasOffset, int Zero>
struct BlockLayout {
    static constexpr int kCodes = ScaleBytes == 4 ? 64 : 32;
    static constexpr int kScale = ScaleBytes;
    static constexpr bool kHasOffset = HasOffset;
    static constexpr int kHigh = ScaleBytes + 2 * HasOffset;
    static constexpr int kBody = kHigh + 4 * (Bits == 5);
    static constexpr int kBytes = kBody + kCodes * (Bits == 8 ? 8 : 4) / 8;

    static uint8_t pack_codes(const uint8_t* codes, uint8_t* block) {
        if constexpr (Bits == 8) {
            std::memcpy(block + kBody, codes, kCodes);
            return 0;
        } else {
            uint64_t bad = 0;
            for (int run = 0; run < kCodes; run += 2 * Half)
                for (int i = run; i < run + Half; i += 8) {
                    const uint64_t low = stored_of<Bits>(load8(codes + i), kZero);
                    const uint64_t high = stored_of<Bits>(load8(codes + i + Half), kZero);
                    bad |= (low | high) & repeat(0x100 - (1 << Bits), 8);
                    if constexpr (Bits == 5) {
                        block[kHigh + i / 8] = (uint8_t)gather<1>(low >> 4 & repeat(1, 8));
                        block[kHigh + (i + Half) / 8] = (uint8_t)gather<1>(high >> 4 & repeat(1, 8));
                    }
                    store8(block + kBody + run / 2 + i - run, (low & kLow) | (high & kLow) << 4);
                }
            return bad != 0;
        }
    }

    static void unpack_codes(const uint8_t* block, uint8_t* codes) {
        if constexpr (Bits == 8) {
            std::memcpy(codes, block + kBody, kCodes);
        } else {
            for (int run = 0; run < kCodes; run += 2 * Half)
                for (int i = run; i < run + Half; i += 8) {
                    const uint64_t packed = load8(block + kBody + run / 2 + i - run);
                    uint64_t low = packed & kLow, high = packed >> 4 & kLow;
                    if constexpr (Bits == 5) {
                        low |= spread<1>(block[kHigh + i / 8]) << 4;
                        high |= spread<1>(block[kHigh + (i + Half) / 8]) << 4;
                    }
                    store8(codes + i, codes_of<Bits>(low, kZero));
                    store8(codes + i + Half, codes_of<Bits>(high, kZero));
                }
        }
    }

private:
    static constexpr uint64_t kZero = repeat(Zero, 8), kLow = repeat(15, 8);
};

// The blocks of a slab, row-major. `scale` holds the scales' bytes, `offset` float16 or null. Returns 0, or anything
// else if a code is out of range.
template <class Layout>
uint8_t pack_blocks(const uint8_t* codes, const uint8_t* scale, const uint8_t* offset, int64_t count, uint8_t* dst) {
    uint8_t bad = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint8_t* block = dst + i * Layout::kBytes;
        std::memcpy(block, scale + i * Layout::kScale, Layout::kScale);
        if constexpr (Layout::kHasOffset) {
            block[Layout::kScale] = offset[2 * i];
            block[Layout::kScale + 1] = offset[2 * i + 1] ^ 0x80;
        }
        bad |= Layout::pack_codes(codes + i * Layout::kCodes, block);
    }
    return bad;
}

template <class Layout>
void unpack_blocks(const uint8_t* src, int64_t count, uint8_t* codes, uint8_t* scale, uint8_t* offset) {
    for (int64_t i = 0; i < count; ++i) {
        const uint8_t* block = src + i * Layout::kBytes;
        std::memcpy(scale + i * Layout::kScale, block, Layout::kScale);
        if constexpr (Layout::kHasOffset) {
            offset[2 * i] = block[Layout::kScale];
            offset[2 * i + 1] = block[Layout::kScale + 1] ^ 0x80;
        }
        Layout::unpack_codes(block, codes + i * Layout::kCodes);
    }
}

struct BlockKernel {
    int type;  // ggml id
    int codes, bytes, scale_bytes;
    bool has_offset;
    uint8_t (*pack)(const uint8_t*, const uint8_t*, const uint8_t*, int64_t, uint8_t*);
    void (*unpack)(const uint8_t*, int64_t, uint8_t*, uint8_t*, uint8_t*);
};

template <class Layout>
constexpr BlockKernel block_kernel(int type) {
    return {type,           Layout::kCodes,     Layout::kBytes,        Layout::kScale, Layout::kHasOffset,
            pack_blocks<Layout>, unpack_blocks<Layout>};
}

constexpr BlockKernel kBlockKernels[] = {
    block_kernel<BlockLayout<4, 16, 2, false, 8>>(2),    // Q4_0
    block_kernel<BlockLayout<4, 16, 2, true, 0>>(3),     // Q4_1
    block_kernel<BlockLayout<5, 16, 2, false, 16>>(6),   // Q5_0
    block_kernel<BlockLayout<5, 16, 2, true, 0>>(7),     // Q5_1
    block_kernel<BlockLayout<8, 16, 2, false, 0>>(8),    // Q8_0
    block_kernel<BlockLayout<4, 16, 1, false, 0>>(39),   // MXFP4
    block_kernel<BlockLayout<4, 8, 4, false, 0>>(40),    // NVFP4
};

}  // namespace lconvert::packing
