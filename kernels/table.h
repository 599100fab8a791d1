// What a translation unit of one instruction set exports: a table of function pointers.
#pragma once
#include <cstddef>
#include <cstdint>

namespace lconvert {

// One storage type. `x` is (nrows, ncols) contiguous and finite, `weights` is (ncols) or null, `dst` takes
// nrows rows of ncols / elems blocks.
struct Kernel {
    int type;  // ggml id
    void (*quantize)(const float* x, int64_t nrows, int64_t ncols, const float* weights, uint8_t* dst);
    void (*dequantize)(const uint8_t* src, int64_t ncols, float* dst);
};

// Integers in groups (rounding.h): `count` groups of `n` values, one after another.
struct Rounding {
    bool (*extents)(const float* x, int64_t count, int64_t n, float* low, float* high);
    void (*round)(const float* x, int64_t count, int64_t n, const float* scales, const float* zeros, float least, float most,
                  int8_t* codes);
    bool (*nearest)(const float* x, int64_t count, int64_t n, int width, bool signed_max, int8_t* codes, float* scales,
                    uint8_t* zeros);
    void (*values)(const uint8_t* codes, bool is_signed, int64_t count, int64_t n, const float* scales, const float* zeros,
                   float* out);
    void (*add_squares)(const float* x, const float* y, int64_t n, double* sums);
};

// Levels of codes: consecutive integers from `low`, or `count` ascending values with the midpoints between them.
struct Levels {
    float low;
    int count;
    const float *values, *midpoints;
};

// A stretch of columns of GPTQ's sweep (sweep.h). Matrices are contiguous: w, old, position, error (rows, cols), upper
// (cols, cols), scale, zero and offset (rows, groups). Null where there is none.
struct Sweep {
    const float *w, *upper;
    Levels levels;
    const float *scale, *zero, *offset;
    const int32_t* group;
    const float* old;
    const uint8_t* kept;  // (rows, cols): 0 where the value stays 0
    uint8_t* position;
    float* error;
    int64_t rows, groups;
    int cols;
};

// Groups to be rounded with each of some candidates (trials.h): x, h (groups, size), scale, offset, error (candidates, groups), sums
// (3, groups) of h q q, h q and h q x. Null where there is none.
struct Trials {
    const float *x, *h;
    Levels levels;
    const float *scale, *offset;
    float *error, *sums;
    int64_t groups, size;
    int candidates;
};

struct Isa {
    const Kernel* kernels;
    size_t count;
    void (*widen_f16)(const uint16_t* src, int64_t n, float* dst);
    void (*widen_bf16)(const uint16_t* src, int64_t n, float* dst);
    // True if every |x[i]|, taken as an unsigned integer, is below `limit`.
    bool (*all_below)(const float* x, int64_t n, uint32_t limit);
    Rounding rounding;
    void (*sweep)(const Sweep& s, int64_t first, int64_t last);
    void (*try_scales)(const Trials& t, int64_t first, int64_t last);
};

// Null where the target architecture lacks the instruction set.
const Isa* isa_baseline();
const Isa* isa_avx2();
const Isa* isa_avx512();
const Isa* isa_neon();

}  // namespace lconvert
