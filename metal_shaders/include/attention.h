// The two passes of decode attention over one tile of 32 TPL tokens, for NQ queries at once.
//
// Score pass: lane (g, t) = (lane / 4, lane % 4) owns the t-th quarter of the sub-vectors of every 8th token; the four
// partial scores of a token are then added so that each lane keeps TPL tokens. Value pass: a lane owns sub-vectors.
// Queries lie in that order too (launch.py: query_order): sub-vector t * key_run + i at place i * key_lanes + t, so that
// the lanes of a simdgroup read neighbours.
//
// Products are of type A (codebook.h: Element). In half they are added up over 32 channels or 16 tokens, then in float.

METAL_FUNC float total(float v) { return v; }
METAL_FUNC float total(half2 v) { return float(v.x) + float(v.y); }

METAL_FUNC void add_to(thread float* acc, float v) { acc[0] += v; }
METAL_FUNC void add_to(thread float* acc, half2 v) {
  acc[0] += float(v.x);
  acc[1] += float(v.y);
}

// The token of the tile, 0 ... 32 TPL - 1, whose score this lane keeps at index u.
template <int TPL>
METAL_FUNC int kept_token(int lane, int u) {
  return (lane % 4 * TPL + u) * 8 + lane / 4;
}

// NQ queries' channels [at, at + d).
template <int NQ, int DIM, int d>
METAL_FUNC void load_queries(const device float* queries, int at, thread float* out) {
  for (int n = 0; n < NQ; ++n) {
    const device float* q = queries + n * DIM + at;
    if (d == 2) {
      const float2 v = *(const device float2*)q;
      out[n * d] = v.x;
      out[n * d + 1] = v.y;
    }
    for (int i = 0; i + 4 <= d; i += 4) {
      const float4 v = *(const device float4*)(q + i);
      out[n * d + i] = v.x;
      out[n * d + i + 1] = v.y;
      out[n * d + i + 2] = v.z;
      out[n * d + i + 3] = v.w;
    }
  }
}

// The first 4 TPL codes of each of UNIT runs of RUN bytes, which follow one another; whole runs in one load.
template <int UNIT, int TPL, int RUN>
METAL_FUNC void load_words(const device uchar* codes, thread uint* out) {
  if (TPL == 2 && UNIT == 2 && RUN == 8) {
    const uint4 v = *(const device uint4*)codes;
    out[0] = v.x;
    out[1] = v.y;
    out[UNIT * TPL - 2] = v.z;
    out[UNIT * TPL - 1] = v.w;
    return;
  }
  for (int p = 0; p < UNIT; ++p) {
    for (int w = 0; w < TPL; ++w) {
      out[p * TPL + w] = ((const device uint*)codes)[p * (RUN / 4) + w];
    }
  }
}

// The same for queries in half.
template <int NQ, int DIM, int d>
METAL_FUNC void load_queries(const device half* queries, int at, thread half2* out) {
  for (int n = 0; n < NQ; ++n) {
    load_device<d>(queries + n * DIM + at, out + n * (d / 2));
  }
}

// NQ weights of one token, four at a time where they are.
template <int NQ, typename A>
METAL_FUNC void load_weights(const threadgroup A* at, thread A* out) {
  typedef typename Element<A>::quad quad;
  for (int n = 0; n + 4 <= NQ; n += 4) {
    const quad v = *(const threadgroup quad*)(at + n);
    out[n] = v.x;
    out[n + 1] = v.y;
    out[n + 2] = v.z;
    out[n + 3] = v.w;
  }
  for (int n = NQ / 4 * 4; n < NQ; ++n) {
    out[n] = at[n];
  }
}

// score[o * NQ + n] += <query n, this lane's sub-vectors of token first_token + o * 8 + g>, o < 4 TPL.
template <typename A, int NQ, int TPL, int DIM, int M, int d, int G, bool IS_SHARED>
METAL_FUNC void score_codes(const device uchar* section, const device A* queries, const threadgroup half* shared,
                            const device half* tables, int first_token, int lane, thread float* score) {
  typedef typename Element<A>::type E;
  constexpr int C = d * int(sizeof(A)) / int(sizeof(E));
  constexpr int RUN = key_run(M);
  constexpr int CHUNK = 32 / d;  // sub-vectors added up in A
  const int t = lane % 4;
  if (t >= key_lanes(M)) {
    return;
  }
  const device uchar* codes = section + first_token / 8;
  constexpr int UNIT = key_unit(M);
  for (int begin = 0; begin < RUN; begin += CHUNK) {
    E sums[4 * TPL * NQ];
    for (int i = 0; i < 4 * TPL * NQ; ++i) {
      sums[i] = splat(A(0.0f));
    }
#pragma unroll 1
    for (int i = begin; i < RUN && i < begin + CHUNK; i += UNIT) {
      uint words[UNIT * TPL];
      load_words<UNIT, TPL, VQ_KEY_RUN>(codes + key_codes_at<M>(lane / 4, t, i), words);
      for (int p = 0; p < UNIT; ++p) {
        const int j = t * RUN + i + p;
        const uint table = table_bytes<d, IS_SHARED>(key_lanes(M) == 4 ? t * G / 4 : j * G / M);
        E q[NQ * C];
        load_queries<NQ, DIM, d>(queries, ((i + p) * key_lanes(M) + t) * d, q);
        for (int w = 0; w < TPL; ++w) {
#pragma unroll
          for (int o = 0; o < 4; ++o) {
            E c[C];
            load_centroid<d, G, IS_SHARED>(shared, tables, table, words[p * TPL + w], o, c);
            for (int n = 0; n < NQ; ++n) {
              for (int k = 0; k < C; ++k) {
                const int at = (w * 4 + o) * NQ + n;
                sums[at] = metal::fma(q[n * C + k], c[k], sums[at]);
              }
            }
          }
        }
      }
    }
    for (int i = 0; i < 4 * TPL * NQ; ++i) {
      score[i] += total(sums[i]);
    }
  }
}

// Adds the four lanes' partial scores; score[u * NQ + n] is then that of kept_token(lane, u).
template <int NQ, int TPL>
METAL_FUNC void share_scores(int lane, thread float* score) {
  for (int bit = 2; bit > 0; bit /= 2) {
    const int count = TPL * bit * NQ;
    const bool is_upper = (lane & bit) != 0;
    for (int i = 0; i < count; ++i) {
      const float sent = is_upper ? score[i] : score[i + count];
      const float kept = is_upper ? score[i + count] : score[i];
      score[i] = kept + simd_shuffle_xor(sent, ushort(bit));
    }
  }
}

// The same for exact keys, a section's channels: `sinks` and `ring` are at its first. Tokens before `num_sinks` lie in the
// sinks, the others in their ring slots; past `last_token` it is read again.
template <typename A, int NQ, int TPL, int DIM, int M, int d>
METAL_FUNC void score_exact(const device half* sinks, const device half* ring, const device A* queries, int first_token,
                            int last_token, int num_sinks, int ring_slots, int lane, thread float* score) {
  typedef typename Element<A>::type E;
  constexpr int C = d * int(sizeof(A)) / int(sizeof(E));
  constexpr int RUN = key_run(M);
  constexpr int CHUNK = 32 / d;
  constexpr int UNIT = key_unit(M);
  const int t = lane % 4;
  if (t >= key_lanes(M)) {
    return;
  }
  const device half* keys[4 * TPL];
  for (int o = 0; o < 4 * TPL; ++o) {
    const int token = min(first_token + o * 8 + lane / 4, last_token);
    keys[o] = (token < num_sinks ? sinks + token * DIM : ring + token % ring_slots * DIM) + t * RUN * d;
  }
  for (int begin = 0; begin < RUN; begin += CHUNK) {
    E sums[4 * TPL * NQ];
    for (int i = 0; i < 4 * TPL * NQ; ++i) {
      sums[i] = splat(A(0.0f));
    }
#pragma unroll 1
    for (int i = begin; i < RUN && i < begin + CHUNK; i += UNIT) {
      E c[4 * TPL * UNIT * C];
      for (int o = 0; o < 4 * TPL; ++o) {
        for (int p = 0; p < UNIT; ++p) {
          load_device<d>(keys[o] + (i + p) * d, c + (o * UNIT + p) * C);
        }
      }
      for (int p = 0; p < UNIT; ++p) {
        E q[NQ * C];
        load_queries<NQ, DIM, d>(queries, ((i + p) * key_lanes(M) + t) * d, q);
        for (int o = 0; o < 4 * TPL; ++o) {
          for (int n = 0; n < NQ; ++n) {
            for (int k = 0; k < C; ++k) {
              sums[o * NQ + n] = metal::fma(q[n * C + k], c[(o * UNIT + p) * C + k], sums[o * NQ + n]);
            }
          }
        }
      }
    }
    for (int i = 0; i < 4 * TPL * NQ; ++i) {
      score[i] += total(sums[i]);
    }
  }
}

// acc[(s * NQ + n) * d + k] += sum over the tile's tokens of weight[token][n] * reconstructed channel.
template <typename A, int NQ, int TPL, int STRIDE, int M, int d, int G, bool IS_SHARED>
METAL_FUNC void add_codes(const device uchar* section, const threadgroup half* shared, const device half* tables,
                          const threadgroup A* weights, int first_token, int lane, thread float* acc) {
  typedef typename Element<A>::type E;
  constexpr int W = int(sizeof(E)) / int(sizeof(A));
  constexpr int C = d / W;
  constexpr int LANES = value_lanes(M);
  constexpr int PARTS = 4 * LANES / 32;  // of the four t, those one token group takes
  for (int s = 0; s < value_steps(M); ++s) {
    const int slot = lane % LANES + s * LANES;
    if (M % LANES == 0 || slot < M) {
      const uint table = table_bytes<d, IS_SHARED>(value_subvec<M>(slot) * G / M);
      const device uchar* codes = section + slot * VQ_PAGE_SIZE + first_token / 4;
      for (int part = 0; part < PARTS; ++part) {
        const int t = lane / LANES * PARTS + part;
        uint words[2 * TPL];
        load_words<TPL, 2, 8>(codes + t * VQ_VALUE_RUN, words);
        E sums[NQ * C];
        for (int i = 0; i < NQ * C; ++i) {
          sums[i] = splat(A(0.0f));
        }
        for (int tile = 0; tile < 2 * TPL; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            A weight[NQ];
            load_weights<NQ>(weights + (tile * 16 + i / 2 * 8 + t * 2 + i % 2) * STRIDE, weight);
            E c[C];
            load_centroid<d, G, IS_SHARED>(shared, tables, table, words[tile], i, c);
            for (int n = 0; n < NQ; ++n) {
              for (int k = 0; k < C; ++k) {
                sums[n * C + k] = metal::fma(splat(weight[n]), c[k], sums[n * C + k]);
              }
            }
          }
        }
        for (int i = 0; i < NQ * C; ++i) {
          add_to(acc + s * NQ * d + i * W, sums[i]);
        }
      }
    }
  }
}

// The same for a tile of exact tokens, which lie as in score_exact. Several are asked for before any is used; past the last
// one it is read again, with the weight 0 that masked tokens have.
template <typename A, int NQ, int TPL, int STRIDE, int DIM, int M, int d>
METAL_FUNC void add_exact(const device half* sinks, const device half* ring, int first_token, int num_tokens,
                          int num_sinks, int ring_slots, const threadgroup A* weights, int lane, thread float* acc) {
  typedef typename Element<A>::type E;
  constexpr int W = int(sizeof(E)) / int(sizeof(A));
  constexpr int C = d / W;
  constexpr int LANES = value_lanes(M);
  for (int s = 0; s < value_steps(M); ++s) {
    const int slot = lane % LANES + s * LANES;
    if (M % LANES == 0 || slot < M) {
      const int channel = value_subvec<M>(slot) * d;
      constexpr int FITTING = 32 * W / d > 16 ? 16 : 32 * W / d;  // tokens whose channels the registers hold
      constexpr int STEP = FITTING > TPL * LANES ? TPL * LANES : FITTING;
#pragma unroll 1
      for (int first = lane / LANES; first < num_tokens; first += STEP * (32 / LANES)) {
        E c[STEP * C];
        for (int j = 0; j < STEP; ++j) {
          const int token = first_token + min(first + j * (32 / LANES), num_tokens - 1);
          const device half* value = token < num_sinks ? sinks + token * DIM : ring + token % ring_slots * DIM;
          load_device<d>(value + channel, c + j * C);
        }
        for (int n = 0; n < NQ; ++n) {
          E sums[C];
          for (int k = 0; k < C; ++k) {
            sums[k] = splat(A(0.0f));
          }
          for (int j = 0; j < STEP; ++j) {
            const E w = splat(weights[(first + j * (32 / LANES)) * STRIDE + n]);
            for (int k = 0; k < C; ++k) {
              sums[k] = metal::fma(w, c[j * C + k], sums[k]);
            }
          }
          for (int k = 0; k < C; ++k) {
            add_to(acc + (s * NQ + n) * d + k * W, sums[k]);
          }
        }
      }
    }
  }
}

// Takes a higher running maximum into account: query n's share of the section times `factor`.
template <int NQ, int M, int d>
METAL_FUNC void rescale(thread float* acc, int n, float factor) {
  for (int s = 0; s < value_steps(M); ++s) {
    for (int k = 0; k < d; ++k) {
      acc[(s * NQ + n) * d + k] *= factor;
    }
  }
}

// Adds up the lanes that hold the same sub-vectors for different tokens.
template <int NQ, int M, int d>
METAL_FUNC void join_token_groups(thread float* acc) {
  for (int offset = value_lanes(M); offset < 32; offset *= 2) {
    for (int i = 0; i < value_steps(M) * NQ * d; ++i) {
      acc[i] += simd_shuffle_xor(acc[i], ushort(offset));
    }
  }
}

// Query n's channels of a section, times `factor`, into `out`.
template <int NQ, int M, int d>
METAL_FUNC void store_section(const thread float* acc, int n, float factor, int lane, threadgroup float* out) {
  constexpr int LANES = value_lanes(M);
  for (int s = 0; s < value_steps(M); ++s) {
    const int slot = lane + s * LANES;
    if (lane < LANES && slot < M) {
      for (int k = 0; k < d; ++k) {
        out[value_subvec<M>(slot) * d + k] = acc[(s * NQ + n) * d + k] * factor;
      }
    }
  }
}
