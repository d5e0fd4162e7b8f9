// Order of codes inside a block of a page: P tokens (page.h) of one head, keys or values, one section of the codec.
//
// The same order as quant_core/codec/page_layout.py (pack_block), as index functions in the subset shared by Metal and CUDA.
// A codec of two sections (3 bits) stores one block after the other: section s starts at P * (sub-vectors before it).
// token: 0 ... P - 1; subvec: 0 ... num_subvecs - 1. Result: byte inside the block, 0 ... P * num_subvecs - 1.
//
// Lanes (g, t) = (lane / 4, lane % 4). num_subvecs a multiple of 8 (M; every head size at 2 and 4 bits but 80, 112):
//   keys:   unit u of lane: sub-vectors t*M/4 + 2u, + 1, tokens o*8 + g, o < P/8; byte ((u*32 + lane)*2 + (i & 1))*P/8 + o
//   values: unit u of lane: sub-vector rev3(g)*M/8 + u, P/4 tokens tile*16 + hi*8 + 2t + lo, tile < P/16;
//           byte (u*32 + lane)*P/4 + tile*4 + hi*2 + lo
// Other num_subvecs: gcd(M, 4) lanes t and units of P/8 bytes for keys, gcd(M, 8) lanes g for values.
#ifndef VECINFER_PAGE_LAYOUT_H
#define VECINFER_PAGE_LAYOUT_H

// Largest power of two that divides both n and limit (itself a power of two).
inline uint page_lanes(uint n, uint limit) {
  uint low = n & (~n + 1u);
  return low < limit ? low : limit;
}

// Bits of g (below lanes, a power of two up to 8) in reverse order.
inline uint page_reverse(uint g, uint lanes) {
  return lanes == 8u ? ((g & 1u) << 2) | (g & 2u) | (g >> 2) : lanes == 4u ? ((g & 1u) << 1) | (g >> 1) : g;
}

// Byte of key code (token, subvec).
inline uint key_code_index(uint token, uint subvec, uint num_subvecs) {
  uint lanes = page_lanes(num_subvecs, 4u);
  uint run = num_subvecs / lanes;
  uint per_unit = page_lanes(run, 2u);
  uint t = subvec / run;
  uint i = subvec % run;
  uint unit = (i / per_unit) * 8u * lanes + (token & 7u) * lanes + t;
  return (unit * per_unit + i % per_unit) * uint(VQ_KEY_RUN) + (token >> 3);
}

// Byte of value code (token, subvec).
inline uint value_code_index(uint token, uint subvec, uint num_subvecs) {
  uint lanes = page_lanes(num_subvecs, 8u);
  uint run = num_subvecs / lanes;
  uint g = page_reverse(subvec / run, lanes);
  uint unit = ((subvec % run) * lanes + g) * 4u + ((token >> 1) & 3u);
  return unit * uint(VQ_VALUE_RUN) + (token >> 4) * 4u + ((token >> 3) & 1u) * 2u + (token & 1u);
}

#endif
