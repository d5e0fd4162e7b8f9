// The page: its size, what follows from it, and which pages a query reads.
//
// kernel_text.py puts `#define VQ_PAGE_SIZE` in front of this, from quant_core/codec/spec.py: tokens a page.
#ifndef VECINFER_PAGE_H
#define VECINFER_PAGE_H

// Tokens o * 8 + g, o = 0, 1 ...: as many as bytes hold a key sub-vector's codes for one g.
#define VQ_KEY_RUN (VQ_PAGE_SIZE / 8)
// Tokens i * 8 + 2t and the next, i = 0, 1 ...: as many as bytes hold a value sub-vector's codes for one t.
#define VQ_VALUE_RUN (VQ_PAGE_SIZE / 4)

static_assert(VQ_PAGE_SIZE % 64 == 0, "a page is whole tiles of 64 tokens");

// np(i): pages that the query at `position` reads as codes (WindowSpec.num_code_pages).
inline int num_code_pages(int position, int window) {
  const int behind = position + 1 - window;
  return behind > 0 ? behind / VQ_PAGE_SIZE : 0;
}

#endif
